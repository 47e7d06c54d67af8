"""`python -m dwt_jax`, the same as the script `dwt`."""

from dwt_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

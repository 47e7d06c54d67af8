"""`dwt export`, and models from elsewhere where a model is wanted, as a user meets them."""

import json

import numpy as np
import pytest
import yaml

from dwt_jax.text_format import format_count
from helpers.runs import dwt, make_project
from helpers.torch_models import SMALL, torch_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    config = make_project(folder)
    run = folder / "run"
    # On eight devices; everything below reads it on one.
    found = dwt(
        "train",
        f"--config={config}",
        f"--workdir={run}",
        "--config.mesh.fsdp=4",
        "--config.mesh.tensor=2",
        variables={"JAX_NUM_CPU_DEVICES": "8"},
    )
    assert found.returncode == 0, found.stderr
    return folder


def tensors(directory):
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def test_a_run_of_eight_devices_at_its_end(project):
    out = project / "end"
    found = dwt("export", f"--model={project / 'run'}", f"--out={out}")
    assert (found.returncode, found.stderr) == (0, "")
    assert "BertForMaskedLM in" in found.stdout
    a, b = tensors(out), tensors(project / "run" / "model")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    report = transformers.AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)[1]
    assert not any(report.values()), report
    assert transformers.AutoTokenizer.from_pretrained(out)("the old cat").input_ids
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


def test_a_kept_step_and_one_that_is_not(project):
    found = dwt("export", f"--model={project / 'run'}", "--step=8", f"--out={project / 'at8'}")
    assert (found.returncode, found.stderr) == (0, "")
    early, late = tensors(project / "at8"), tensors(project / "run" / "model")
    assert early.keys() == late.keys()
    assert not torch.equal(early["cls.predictions.bias"], late["cls.predictions.bias"])
    last = dwt("export", f"--model={project / 'run'}", "--step=12", f"--out={project / 'at12'}")
    assert last.returncode == 0
    at12 = tensors(project / "at12")
    assert all(torch.equal(at12[name], late[name]) for name in late)
    found = dwt("export", f"--model={project / 'run'}", "--step=7", f"--out={project / 'at7'}")
    assert found.returncode == 2
    assert "--step is 7, expected a checkpoint that" in found.stderr
    assert "4, 8, 12" in found.stderr
    assert not (project / "at7").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_types(project, dtype):
    out = project / dtype
    assert dwt("export", f"--model={project / 'run'}", f"--out={out}", f"--dtype={dtype}").returncode == 0
    whole = tensors(project / "run" / "model")
    for name, tensor in tensors(out).items():
        assert torch.equal(tensor, whole[name].to(getattr(torch, dtype))), name
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def test_the_card_says_what_the_run_says(project):
    card = (project / "run" / "model" / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    header = yaml.safe_load(header)
    summary = json.loads((project / "run" / "summary.json").read_text())
    assert header["library_name"] == "transformers"
    assert header["pipeline_tag"] == "fill-mask"
    assert "dwt-jax" in header["tags"]
    metrics = {m["name"]: m["value"] for m in header["model-index"][0]["results"][0]["metrics"]}
    assert metrics == {
        key: summary["held_out"][key] for key in ("held_out_loss", "perplexity", "top1_accuracy")
    }
    assert f"{summary['held_out']['held_out_loss']:.4f}" in body
    loss_per_byte = summary["held_out"]["loss_per_byte"]
    assert f"| loss per byte (nats; of masked tokens, not a code length) | {loss_per_byte:.4f} |" in body
    assert f"{summary['data']['train_tokens']:,} tokens" in body
    rows = 12 * 8
    num_tokens = format_count(rows * summary["data"]["tokens_per_row"])
    assert f"({format_count(rows * 32)} positions, {num_tokens} tokens without padding)" in body
    assert str(project) not in card  # nobody's folders are published


def test_a_place_that_is_taken(project, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    found = dwt("export", f"--model={project / 'run'}", f"--out={tmp_path}")
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert "is not empty" in found.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_classifier_keeps_its_labels(tmp_path):
    theirs = torch_model("BertForSequenceClassification", SMALL)
    names = {0: "whig", 1: "federalist", 2: "none"}
    theirs.config.id2label, theirs.config.label2id = names, {name: i for i, name in names.items()}
    theirs.save_pretrained(tmp_path / "theirs")
    found = dwt("export", f"--model={tmp_path / 'theirs'}", f"--out={tmp_path / 'ours'}")
    assert found.returncode == 0, found.stderr
    assert "BertForSequenceClassification" in found.stdout
    ours = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    assert ours.config.id2label == names
    assert ours.config.label2id == theirs.config.label2id
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_without_heads(project, tmp_path):
    found = dwt("export", f"--model={project / 'run'}", f"--out={tmp_path / 'out'}", "--encoder-only")
    assert found.returncode == 0, found.stderr
    _, report = transformers.AutoModel.from_pretrained(
        tmp_path / "out", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report.values()), report


def test_a_model_from_elsewhere_teaches_and_is_evaluated(project, tmp_path):
    """A padded vocabulary in half precision, from a pickle: what hubs are full of."""
    words = len(transformers.AutoTokenizer.from_pretrained(project / "run" / "model"))
    theirs = torch_model("RobertaForMaskedLM", {**SMALL, "vocab": words + 20})
    config = json.loads(theirs.config.to_json_string())
    config["max_position_embeddings"] = 64
    theirs = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**config)).half()
    directory = tmp_path / "theirs"
    transformers.AutoTokenizer.from_pretrained(project / "run" / "model").save_pretrained(directory)
    theirs.config.save_pretrained(directory)
    torch.save(theirs.state_dict(), directory / "pytorch_model.bin")
    run = tmp_path / "run"
    found = dwt(
        "train",
        f"--config={project / 'tiny.py'}",
        f"--workdir={run}",
        f"--config.teacher.path={directory}",
        "--config.distill.preset=paper_normal",
        "--config.train.steps=2",
    )
    assert found.returncode == 0, found.stderr
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert abs(record["teacher_hard_loss"] - np.log(words)) < 1  # an untrained teacher
    rows = tmp_path / "rows"
    assert dwt("prepare", f"--config={project / 'tiny.py'}", f"--workdir={rows}").returncode == 0
    found = dwt("evaluate", f"--model={directory}", f"--data={rows}", "--json")
    assert found.returncode == 0, found.stderr
    assert abs(json.loads(found.stdout)["held_out_loss"] - np.log(words + 20)) < 1
    found = dwt("evaluate", f"--model={tmp_path / 'nothing'}", f"--data={rows}")
    assert found.returncode == 2


def test_a_model_without_a_head_cannot_be_evaluated(project, tmp_path):
    torch_model("BertModel", SMALL).save_pretrained(tmp_path / "bare")
    rows = tmp_path / "rows"
    assert dwt("prepare", f"--config={project / 'tiny.py'}", f"--workdir={rows}").returncode == 0
    found = dwt("evaluate", f"--model={tmp_path / 'bare'}", f"--data={rows}")
    assert found.returncode == 2
    assert "a model without a language-model head (it has pooler)" in found.stderr
    assert found.stderr.count("\n") == 1

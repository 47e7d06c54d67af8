"""Parsing of collectives from HLO, against counts and sizes by hand."""

import pytest

from dwt_jax.aot.hlo import Collective, find_collectives

PROGRAM = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}
%body (carry: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %one = f32[4,8]{1,0:T(8,128)} all-reduce(%x), replica_groups=mesh['data'=4,'fsdp'=2] {'data'}, to_apply=%add
  %both = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%y), replica_groups={{0,1},{2,3}}, dimensions={0}
  %done = bf16[16,8]{1,0} all-gather-done(%both)
}
%condition (carry: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}
%open (carry: (s32[])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
%inner (carry: (s32[])) -> (s32[]) {
  %p = s32[5]{0} collective-permute(%q), source_target_pairs={{0,1}}
}
%fused (p: f32[3]) -> f32[3] {
  %r = f32[3]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}
ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %loop = (s32[], f32[4,8]) while(%start), condition=%condition, body=%body
  %counted = (s32[]) while(%s), condition=%open, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %f = f32[3]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %all = (f32[2,2]{1,0}, f32[]) all-reduce(%a, %b), replica_groups={}, to_apply=%add
}
"""


def test_find_collectives_equals_counts_and_sizes_by_hand():
    collectives = find_collectives(PROGRAM)
    assert collectives == [
        Collective("all-reduce", 128, 4, 6, True),
        Collective("all-gather", 256, 2, 6, True),
        Collective("collective-permute", 20, 0, 3, True),
        Collective("reduce-scatter", 48, 4, 1, True),
        Collective("all-reduce", 20, 0, 1, True),
    ]
    bytes_sent = [collective.bytes_sent(8) for collective in collectives]
    assert bytes_sent == [6 * 128 * 1.5, 6 * 256 / 2, 60, 36, 20 * 1.75]


def test_find_collectives_reports_an_unknown_trip_count():
    program = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
    trip_counts_known = [collective.trip_counts_known for collective in find_collectives(program)]
    assert trip_counts_known == [True, True, False, True, True]


TPU = """
%all-reduce-scatter.2 (input: f32[16,8]) -> f32[2,8] {
  %full = f32[16,8]{1,0:T(8,128)} all-reduce(%input), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = f32[2,8]{1,0} dynamic-slice(%full, %start, %zero), dynamic_slice_sizes={2,8}
}
%first (p: bf16[4,32]) -> (bf16[4,32], bf16[4,256]) {
  %g1 = bf16[4,256]{1,0} all-gather(%p), channel_id=32, replica_groups={{0,1,2,3}}, OVERLAP
  ROOT %c1 = (bf16[4,32], bf16[4,256]) custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}
%second (p: bf16[4,32]) -> bf16[4,256] {
  %g2 = bf16[4,256]{1,0} all-gather(%p), channel_id=32, replica_groups={{0,1,2,3}}, OVERLAP
}
%third (p: bf16[4,32]) -> bf16[4,256] {
  %g3 = bf16[4,256]{1,0} all-gather(%p), channel_id=33, replica_groups={{0,1,2,3}}, OVERLAP
}
ENTRY %main (x: f32[16,8]) -> f32[2,8] {
  %f0 = f32[2,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2
  %f1 = (bf16[4,32], bf16[4,256]) fusion(%x), kind=kLoop, calls=%first
  %f2 = bf16[4,256]{1,0} fusion(%f1), kind=kOutput, calls=%second
  %f3 = bf16[4,256]{1,0} fusion(%f2), kind=kLoop, calls=%third
  ROOT %done = bf16[4,256]{1,0} fusion(%f2), kind=kLoop, calls=%second
}
""".replace("OVERLAP", 'backend_config={"async_collective_fusion_config":{"flag_end":"8","flag_start":"2"}}')


def test_find_collectives_parses_fusions_of_tpus():
    """A reduce-scatter is a fusion with that name. A gather that overlaps with other work is in each of the
    fusions that it overlaps with."""
    collectives = find_collectives(TPU)
    assert collectives == [
        Collective("reduce-scatter", 512, 4, 1, True),
        Collective("all-gather", 2048, 4, 1, True),
        Collective("all-gather", 2048, 4, 1, True),
    ]
    assert [collective.bytes_sent(4) for collective in collectives] == [384, 1536, 1536]


@pytest.mark.parametrize(
    ("line", "kind_index", "size"),
    [
        ("((bf16[2,8]{1,0}, f32[4]{0}), (bf16[8,8]{1,0}, f32[16]{0})) all-gather-start(%a, %b)", 0, 192),
        ("((f32[16]{0:T(128)}), f32[4]{0}, u32[]) reduce-scatter-start(%a)", 1, 64),
        ("(f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%a)", 2, 64),
        ("(f32[16]{0}, bf16[16]{0}) all-reduce-start(%a, %b)", 3, 96),
    ],
)
def test_find_collectives_sums_the_arrays_of_an_asynchronous_start(line, kind_index, size):
    kinds = ("all-gather", "reduce-scatter", "collective-permute", "all-reduce")
    program = f"ENTRY %main (x: f32[]) -> f32[] {{\n  %s = {line}, replica_groups={{{{0,1,2,3}}}}\n}}\n"
    assert find_collectives(program) == [Collective(kinds[kind_index], size, 4, 1, True)]


def test_find_collectives_counts_an_asynchronous_call_once():
    program = """
%sent (p: f32[16]) -> f32[4] {
  %r = f32[4]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}
ENTRY %main (x: f32[16]) -> f32[4] {
  %s = ((f32[16]), f32[4], s32[]) async-start(%x), calls=%sent
  %u = ((f32[16]), f32[4], s32[]) async-update(%s), calls=%sent
  ROOT %d = f32[4]{0} async-done(%u), calls=%sent
}
"""
    assert find_collectives(program) == [Collective("reduce-scatter", 64, 4, 1, True)]

"""Memory traffic and collectives, read from programs whose traffic is known."""

import pytest

from dalle2_jax.planning import hlo
from dalle2_jax.planning.hlo import Collective, read_group, read_traffic, shape_bytes

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%sliced (param_0.1: f32[6,16,16], param_1.1: s32[], param_2.1: f32[8,16]) -> f32[8,16] {
  %param_2.1 = f32[8,16]{1,0} parameter(2)
  %param_0.1 = f32[6,16,16]{2,1,0:T(8,128)} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %bitcast.9 = f32[6,256]{1,0} bitcast(%param_0.1)
  %dynamic-slice.1 = f32[1,256]{1,0} dynamic-slice(%bitcast.9, %param_1.1), dynamic_slice_sizes={1,256}
  %bitcast.1 = f32[16,16]{1,0} bitcast(%dynamic-slice.1)
  ROOT %dot.1 = f32[8,16]{1,0} dot(%param_2.1, %bitcast.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%stored (param_0.2: f32[6,8,16], param_1.2: f32[8,16], param_2.2: s32[]) -> f32[6,8,16] {
  %param_0.2 = f32[6,8,16]{2,1,0} parameter(0)
  %param_1.2 = f32[8,16]{1,0} parameter(1)
  %param_2.2 = s32[] parameter(2)
  %bitcast.2 = f32[1,8,16]{2,1,0} bitcast(%param_1.2)
  ROOT %dynamic-update-slice.1 = f32[6,8,16]{2,1,0} dynamic-update-slice(%param_0.2, %bitcast.2, %param_2.2)
}

%body (carry: (s32[], f32[8,16], f32[6,16,16], f32[6,8,16])) -> (s32[], f32[8,16], f32[6,16,16], f32[6,8,16]) {
  %carry = (s32[], f32[8,16]{1,0}, f32[6,16,16]{2,1,0}, /*index=3*/f32[6,8,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%carry), index=1
  %w = f32[6,16,16]{2,1,0} get-tuple-element(%carry), index=2
  %kept = f32[6,8,16]{2,1,0} get-tuple-element(%carry), index=3
  %product = f32[8,16]{1,0} fusion(%w, %i, %x), kind=kOutput, calls=%sliced
  %sum = f32[8,16]{1,0} all-reduce(%product), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %new = f32[6,8,16]{2,1,0} fusion(%kept, %sum, %i), kind=kLoop, calls=%stored
  ROOT %next = (s32[], f32[8,16]{1,0}, f32[6,16,16]{2,1,0}, f32[6,8,16]{2,1,0}) tuple(%i, %sum, %w, %new)
}

%condition (carry.1: (s32[], f32[8,16], f32[6,16,16], f32[6,8,16])) -> pred[] {
  %carry.1 = (s32[], f32[8,16]{1,0}, f32[6,16,16]{2,1,0}, f32[6,8,16]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %limit = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (p0: f32[8,16], p1: f32[2,16]) -> f32[8,16] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = f32[2,16]{1,0} parameter(1)
  %start = ((f32[2,16]{1,0}), f32[8,16]) all-gather-start(%p1), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  %gathered = f32[8,16]{1,0} all-gather-done(%start)
  %tuple.1 = (s32[], f32[8,16]{1,0}, f32[6,16,16]{2,1,0}, f32[6,8,16]{2,1,0}) tuple(%p0, %gathered)
  %loop = (s32[], f32[8,16]{1,0}, f32[6,16,16]{2,1,0}, f32[6,8,16]) while(%tuple.1), condition=%condition, body=%body
  ROOT %result = f32[8,16]{1,0} add(%p0, %gathered)
}
"""

ROW, WEIGHT = 8 * 16 * 4, 16 * 16 * 4
"""Bytes of a [8, 16] and of one layer's [16, 16]."""


def test_loops_count_as_often_as_they_run():
    """Of stacked weights one layer is read a turn, and of stacked results one row is written."""
    traffic = read_traffic(PROGRAM, 8)
    assert traffic.matrix_bytes == 6 * (WEIGHT + 4 + ROW + ROW)
    assert traffic.other_bytes == 6 * (ROW + 4 + ROW) + 3 * ROW
    reduced, gathered = sorted(traffic.collectives, key=lambda each: each.kind, reverse=True)
    assert reduced == Collective("all-reduce", ROW, (0, 1, 2, 3), 6)
    assert gathered == Collective("all-gather", ROW // 4, (0, 2, 4, 6), 1)


def test_the_workspace_of_a_library_is_no_traffic():
    call = 'custom-call(%p1, %p0), custom_call_target="__cublas$lt$matmul"'
    line = f"  %product = (f32[2,16]{{1,0}}, s8[4194304]{{0}}) {call}\n  ROOT %result"
    traffic = read_traffic(PROGRAM.replace("  ROOT %result", line), 8)
    assert traffic.matrix_bytes == read_traffic(PROGRAM, 8).matrix_bytes + ROW // 4 + ROW // 4 + ROW


def test_the_noted_length_of_a_loop_counts():
    noted = PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"},"x":1}')
    assert [each.runs for each in read_traffic(noted, 8).collectives if each.kind == "all-reduce"] == [3]


def test_what_one_device_sends_on_a_ring():
    group = tuple(range(4))
    assert Collective("all-gather", 100, group, 2).sent == 600
    assert Collective("all-reduce", 100, group, 1).sent == 150
    assert Collective("reduce-scatter", 100, group, 1).sent == 75
    assert Collective("all-to-all", 100, group, 1).sent == 75
    assert Collective("collective-permute", 100, (0, 1), 1).sent == 100


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, to_apply=%add", (0, 2)),
        ("replica_groups=[4,2]<=[8], dimensions={0}", (0, 1)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", (0, 4)),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("source_target_pairs={{0,0},{1,3},{3,1}}", (1, 3)),
        ("replica_groups={}, to_apply=%add", tuple(range(8))),
    ],
)
def test_groups_are_read_in_every_form(attributes, group):
    assert read_group(attributes, 8) == group


def test_bytes_of_types():
    assert shape_bytes("bf16[2,8]{1,0:T(8,128)(2,1)}") == 32
    assert shape_bytes("(f32[3]{0}, s32[], token[], u4[8])") == 12 + 4 + 4


def test_an_empty_program_has_no_traffic():
    assert read_traffic("", 8) == hlo.Traffic(0.0, 0.0, ())

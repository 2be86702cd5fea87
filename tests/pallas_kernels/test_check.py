"""`python -m pallas_kernels.check`: what is read from the compilers' reports, and the program from its command line."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from pallas_kernels import targets
from pallas_kernels.attention import api, chunked, conformance
from pallas_kernels.check import cases, device, llo, ptxas, rivals

PTXAS = """\
Resources(smem_scratch_bytes=100352, tmem_scratch_cols=0, barrier_counts=Counter())
Resources(smem_scratch_bytes=2048, tmem_scratch_cols=0, barrier_counts=Counter())
ptxas info    : 0 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the wgmma pipeline in the function 'forward_mosaic_gpu_kernel'
ptxas info    : Compiling entry function 'forward_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for forward_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
ptxas info    : Compile time = 232.710 ms
\t.section\t.text.forward_mosaic_gpu_kernel,"ax",@progbits
        /*0a10*/                   HGMMA.64x64x16.F32 R24, gdesc[UR16], R24 ;
        /*0a20*/                   HGMMA.64x64x16.F32 R24, gdesc[UR20], R24, gsb0 ;
ptxas info    : Compiling entry function 'backward_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for backward_mosaic_gpu_kernel
    96 bytes stack frame, 40 bytes spill stores, 56 bytes spill loads
ptxas info    : Used 255 registers, used 9 barriers
"""

UTILIZATION = """\
== CAPACTIY:
MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 0 0 0 0 0 1
1 0 0 1 0 0 0 0 0 0 0
2 1 0 0 0 0 1 1 0 0 0
0 0 0 0 0 0 0 0 1 1 0
0 0 0 0 0 0 0 0 0 0 1
""" + 10 * "0 0 0 0 0 0 0 0 0 0 0\n"

BUNDLES = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = inlined_call_operand.hbm [shape: bf16[1,8], index: 0] }
   0x1 LB: > { %s2_s1 = sphi %s1_s0, %s3_s1 } /* Start region 9 :: Start region 2 */
   0x2   : > { %s4_s2 = smov.u32 0  ;;  %5 = vst [vmem:[#allocation3]] %v1_v0
pad_low: (0, 0, 0, 0)
 }
   0x3 LB: >> { %6 = vmatmul.bf16.gmra.mxu0 %v1_v0 } /* Start region 5 */
   0x4   : >> { %7 = sbr.rel (%p1_p0) target = $region5 }
   0x5   :  {}
   0x6   :  {}
   0x7   : >> {}
   0x8   :  {}
   0x9 PF: > { %p2_p1 = scmp.ge.s32.totalorder %s2_s1, 514 /* loop exit test */ }
   0xa   :  { %8 = sbr.rel (!%p2_p1) target = $region9 }
   0xb   : > {}
   0xc   :  {}
   0xd   :  {}
   0xe   :  {}
   0xf   :  { %9 = vsyncpa [#allocation5], 1 }
"""


def test_what_the_assembler_says_is_read():
    forward, backward = ptxas.kernels(PTXAS)
    assert (forward.registers, forward.stack, forward.spills, forward.hgmma) == (168, 0, 0, 2)
    assert "serialized" in forward.warnings[0] and not backward.warnings
    assert (backward.registers, backward.stack, backward.spills, backward.hgmma) == (255, 96, 96, None)
    assert ptxas.shared_memory(PTXAS) == 100_352
    assert ptxas.kernels("") == [] and ptxas.shared_memory("") is None


def test_the_schedule_of_a_tpu_kernel_is_read(tmp_path):
    (tmp_path / "17-flash.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(UTILIZATION)
    (tmp_path / "17-flash.1-72-final_bundles.txt").write_text(BUNDLES)
    (tmp_path / "17-flash.1-69-post-delay-converter.txt").write_text(
        "  #allocation3 [shape = 'f32[512,128]{1,0:T(8,128)}', space=vmem, size = 0x40000, scoped]\n"
        "  #allocation4 [shape = 's32[1]{0}', space=sflag, size = 0x4, scoped]\n"
        "    #allocation6 [shape = 'u8[262144]{0}', space=vmem, size = 0x1000, scoped, tag = 'input window']\n"
    )
    kernel = llo.kernel("flash.1", tmp_path)
    assert kernel.vmem == 0x41000
    assert (kernel.bundles, kernel.step, kernel.loops) == (16, 14, (6,))
    assert (kernel.steps, kernel.tiles) == (514, (6,))
    assert kernel.products == pytest.approx(2 / 14)
    assert (kernel.spills, kernel.fills) == (1, 1)
    with pytest.raises(FileNotFoundError, match="flash.2"):
        llo.kernel("flash.2", tmp_path)


def test_a_loop_ends_with_its_branch_back_and_what_that_delays():
    """Code of after a loop is moved up into it, here in its fourth bundle; a neighbour follows at once."""
    lines = [
        "   0x0   : > { before }",
        "   0x1 LB: >> { one } /* Start region 7 :: Start region 3 */",
        "   0x2   : >> { %p1_p0 = scmp.ge.s32.totalorder %s1_s1, 8 /* loop exit test */ }",
        "   0x3   : >> { %2 = sbr.rel (%p3_p3) target = $region4 }",
        "   0x4   : > { moved up }",
        *(f"   0x{at:x}   : >> {{ one }}" for at in range(5, 15)),
        "   0xf   : > { %3 = sbr.rel (!%p1_p0) target = $region7 } /* Start region 4 */",
        *(f"   0x{at:x}   :  {{}}" for at in range(16, 20)),
        "  0x14 LB: >> { another } /* End region 7 :: Start region 8 */",
        "  0x15   : >> { %4 = sbr.rel (!%p2_p0) target = $region8 }",
        *(f"  0x{at:x}   : >> {{ another }}" for at in range(22, 26)),
        "  0x1a   : > { after }",
    ]
    bundles = llo.read_bundles("\n".join(lines))
    assert llo.loops(bundles) == {1: [(1, 20), (20, 26)]}
    assert llo.turns(bundles[:20], 0, 20, [(1, 20)]) == [1] + 19 * [8]
    with pytest.raises(ValueError, match="no branch back to the loop that begins with bundle 1:"):
        llo.loops([dataclasses.replace(bundle, code=bundle.code.replace("$region7", "$region6")) for bundle in bundles])


def test_loops_are_counted_as_often_as_they_turn():
    """A step of the grid with a loop of 8 turns, one of 4 around one of 2, whose exit test stands in the inner one, and
    two bundles that are skipped where an index is not 0."""
    lines = [
        "   0x1 LB: > { %p1_p0 = scmp.ne.s32.totalorder %s1_s1, 0  ;;  %2 = sbr.rel (%p1_p0) target = $region9 }",
        "   0x2   : > { first }",
        "   0x3   : > { first }",
        "   0x4   : > { 4 } /* Start region 9 */",
        "   0x5 LB: >> { %p2_p1 = scmp.ge.s32.totalorder %s2_s2, 8 /* loop exit test */ }",
        "   0x6   : >> { eight }",
        "   0x7 LB: >> { four }",
        "   0x8 LB: >>> { %p3_p2 = scmp.ge.s32.totalorder %s3_s3, 2 /* loop exit test */ }",
        "   0x9   : >>> { %p4_p3 = scmp.ge.s32.totalorder (%p3_p2), %s4_s4, 4 /* loop exit test */ }",
        "   0xa   : > { last }",
    ]
    bundles = llo.read_bundles("\n".join(lines))
    inner = [(4, 6), (6, 9), (7, 9)]
    assert llo.turns(bundles, 0, 10, inner) == [1, 0, 0, 1, 8, 8, 4, 8, 8, 1]
    dynamic = [dataclasses.replace(b, code=b.code.replace("8 /*", "%s9_s9 /*")) for b in bundles]
    assert llo.turns(dynamic, 0, 10, inner) is None


def test_static_cycles_are_those_of_the_tiles_that_are_visited():
    for queries, keys, seen, cut in ((512, 512, 36, 8), (512, 1024, 20, 8), (1024, 512, 20, 8)):
        lines = rivals.causal_tiles(4096, queries, keys)
        assert (sum(n for n, _ in lines), sum(n - whole for n, whole in lines)) == (seen, cut)
    shape, kernel = rivals.SHAPES["4,096"], {"name": "k", "step": 1000, "steps": 66, "optional": 0}
    visited, cut = 8 * 10, 8 * 4  # 8 heads, 1,024 x 1,024
    assert rivals.cycles_of(kernel | {"tiles": []}, shape, 1024, 1024) == 66 * 1000
    assert rivals.cycles_of(kernel | {"tiles": [700]}, shape, 1024, 1024) == 66 * 300 + visited * 700
    both = rivals.cycles_of(kernel | {"tiles": [400, 500]}, shape, 1024, 1024)
    assert both == 66 * 100 + (visited - cut) * 400 + cut * 500
    # In stages: of rows with 0, 1, 2 and 3 tiles that are seen whole, those before the last of these; 8 heads, 4 rows.
    stages = rivals.cycles_of(kernel | {"tiles": [100, 300, 400, 50], "optional": 70}, shape, 1024, 1024)
    assert stages == 66 * 80 + 8 * (4 * (100 + 50 + 70) + 3 * 300 + 7 * 400)
    # In pairs, with two outer tiles of two: 10 pairs in 4 + 2 runs, of which the first of each is outside of the loop.
    pairs = {"name": "k_1024_1024_2.1", "tiles": [60, 200, 40], "inside": 20, "others": [5, 6]}
    found = rivals.cycles_of(kernel | pairs, shape, 1024, 1024)
    assert found == 66 * 700 + 8 * (2 * (60 + 40 + 5 + 6) + 8 * (200 - 20) // 2 + 4 * 20 // 2)
    with pytest.raises(ValueError, match="5 parts of a step"):
        rivals.cycles_of(kernel | {"tiles": [1, 2, 3, 4, 5]}, shape, 1024, 1024)


@pytest.mark.parametrize("platform, target", [("gpu", "h200"), ("tpu", "v5e")])
def test_a_missing_compiler_is_told_with_what_to_install(monkeypatch, platform, target):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(targets.shutil, "which", lambda name: None)
    monkeypatch.setattr(targets, "Path", lambda *parts: Path("/nowhere"))
    with pytest.raises(targets.MissingCompiler, match=r"needs .*(libtpu|libdevice).*: pip install -e \.\[check\]"):
        targets.check_compilers(targets.find(target))


def test_every_op_has_calls_of_its_real_shapes():
    for name, op in cases.OPS.items():
        assert set(op.quick) <= set(op.shapes), name
        for shape in op.shapes.values():
            function, arguments = op.call(shape)
            assert callable(function) and arguments[0].shape[:2] == (shape.B, shape.T)


def test_a_wrong_implementation_is_told_on_the_device(monkeypatch, capsys):
    class Wrong:
        @staticmethod
        def run(*call):
            o, logsumexp = chunked.run(*call)
            return o * jnp.asarray(1.5, o.dtype), logsumexp

    quick = device.OPS["attention"]._replace(quick=("one tile",))
    monkeypatch.setattr(device, "OPS", {"attention": quick})
    monkeypatch.setattr(device, "DTYPES", {"cpu": ("float32",)})
    monkeypatch.setattr(api, "IMPLEMENTATIONS", api.IMPLEMENTATIONS | {"wrong": Wrong})
    conformance._both.cache_clear()
    assert device.run(["attention"], quick=True) == 1
    printed = capsys.readouterr().out
    assert "1 right, 1 wrong" in printed and "| attention | wrong | float32 | one tile | o 5.0e-01 WRONG" in printed


def check(*arguments):
    """Runs the program where it finds `checked_ops`."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parents[1])])
    command = [sys.executable, "-m", "pallas_kernels.check", *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)


def test_a_wrong_name_is_told():
    ended = check("--ops=atention")
    expected = f"op='atention': expected one of {', '.join(cases.OPS)}. Did you mean 'attention'?"
    assert ended.returncode == 2 and expected in ended.stderr, ended.stderr
    with pytest.raises(ValueError, match="expected one of h100, h200, a100, b200, v5e, v5p, v6e. Did you mean 'h200'?"):
        targets.find("h20")


def installed(target):
    try:
        targets.check_compilers(targets.find(target))
    except targets.MissingCompiler:
        return False
    return True


needs_compilers = pytest.mark.skipif(not (installed("h200") and installed("v6e")), reason=f"needs {targets.INSTALL}")


@needs_compilers
def test_kernels_are_compiled_and_what_fails_or_spills_is_told(tmp_path):
    out = tmp_path / "rows.json"
    ended = check("--cases=checked_ops", "--target=h200,v6e", f"--out={out}")
    assert ended.returncode == 1, ended.stderr
    saved = json.loads(out.read_text())
    assert saved["versions"]["jax"] and saved["date"]
    rows = {(row["target"], row["op"]): row for row in saved["rows"]}
    assert len(rows) == 8
    for target in ("h200", "v6e"):
        assert "SIGABRT" in rows[target, "ends_the_process"]["error"]
        assert rows[target, "raises"]["error"] == "ValueError: no kernel for this"
    (gpu,), (tpu,) = (rows[target, "copies"]["kernels"] for target in ("h200", "v6e"))
    assert 16 <= gpu["registers"] <= 255 and gpu["spill_stores"] == 0 and gpu["shared_memory"] == 64 * 128 * 4
    assert tpu["step"] > 32 and tpu["spills"] == 0 and tpu["vmem"] == 4 * 256 * 128 * 4  # two windows in, two out
    assert rows["h200", "spills"]["kernels"][0]["spill_stores"] > 0
    assert rows["v6e", "spills"]["kernels"][0]["spills"] > 0
    assert "spills" in ended.stdout and "8 rows, 6 of them wrong" in ended.stdout


@needs_compilers
def test_the_ops_compile_for_a_gpu_and_a_tpu():
    ended = check("--quick", "--target=h200,v6e", "--ops=attention,wkv")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "7 rows, 0 of them wrong" in ended.stdout
    by = [line.split(" | ")[4] for line in ended.stdout.splitlines() if "| attention |" in line]
    assert sorted(by) == ["cudnn", "mosaic_gpu", "mosaic_gpu", "mosaic_tpu", "mosaic_tpu"], ended.stdout

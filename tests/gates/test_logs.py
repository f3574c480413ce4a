"""The static gates on recorded output of ptxas and cuobjdump: what must fail fails, with the reason."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from build_tools.cuda_logs import Kernel, demangle, parse_ptxas, parse_sass
from build_tools.gates import problems, table, unused
from build_tools.kernel_limits import HOPPER, Rule

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).parent / "recorded"  # of planted.cu, and of tests/sim/ptx/gemm_wgmma.cuh, by CUDA 13.0
SPILLS = "_ZN5pydit4cuda15too_many_valuesIfLi64EEEvPKT_PS2_"
EARLY = "_ZN5pydit4cuda13touched_earlyEPfmm"
pytestmark = pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt (binutils) is not installed")


@pytest.fixture(scope="module")
def kernels():
    return {kernel.symbol: kernel for kernel in parse_ptxas((RECORDED / "ptxas_planted.txt").read_text())}


@pytest.fixture(scope="module")
def sass():
    return parse_sass((RECORDED / "sass_planted.txt").read_text())


def test_ptxas_rows(kernels):
    assert kernels[SPILLS] == Kernel(SPILLS, "sm_90a", "too_many_values<float, 64>", registers=32, stack=264,
                                     spill_stores=264, spill_loads=368, shared=32)
    early = kernels[EARLY]
    assert (early.registers, early.stack, early.spill_stores, early.shared) == (58, 0, 0, 0)
    assert [note[:7] for note in early.notes] == ["(C7519)", "(C7517)"]


def test_a_planted_spill_fails(kernels):
    assert problems(kernels[SPILLS], None) == ["spill stores: expected at most 0 bytes, got 264",
                                               "spill loads: expected at most 0 bytes, got 368",
                                               "stack frame: expected at most 0 bytes, got 264"]


def test_a_planted_wgmma_note_fails(kernels):
    first, second = problems(kernels[EARLY], None)
    assert "warpgroup.arrive is injected" in first and "warpgroup.wait is injected" in second
    text, failed = table(list(kernels.values()), None)
    assert failed == 2 and "warpgroup.wait is injected" in text


def test_a_note_without_its_kernel_is_not_lost():
    with pytest.raises(ValueError, match=r"a note about one of 0 kernels, got .\(C7510\) Potential"):
        parse_ptxas("ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized "
                    "due to insufficient register resources for the wgmma pipeline in the function '_Z1fv'")


def test_the_frame_of_a_called_function_counts():
    log = ("ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'\n"
           "ptxas info    : Function properties for _Z1kv\n"
           "    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
           "ptxas info    : Used 12 registers, used 0 barriers\n"
           "ptxas info    : Function properties for _Z1fv\n"
           "    16 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n")
    [kernel] = parse_ptxas(log)
    assert (kernel.stack, kernel.spill_stores, kernel.spill_loads, kernel.registers) == (24, 4, 12, 12)


def test_local_memory_in_sass_fails(kernels, sass):
    clean = replace(kernels[SPILLS], stack=0, spill_stores=0, spill_loads=0)
    assert problems(clean, sass) == ["local memory: expected none, got 6 STL"]
    assert problems(replace(kernels[EARLY], notes=[]), sass) == []


def test_a_rule_allows_so_much_and_no_more(kernels, sass):
    rule = Rule("too_many_values<float", "planted", arch="sm_90a", spill=368, stack=264)
    assert problems(kernels[SPILLS], sass, [rule]) == []
    assert problems(kernels[SPILLS], sass, [replace(rule, arch="sm_80")])
    assert problems(kernels[SPILLS], sass, [replace(rule, spill=367)]) == [
        "spill loads: expected at most 367 bytes, got 368"]


def test_a_launch_with_fewer_registers_than_are_dealt_out_fails():
    kernel = Kernel("k", "sm_90a", "joint_attention_backward_sm90_kernel<__half, 128, true>", registers=160)
    assert problems(kernel, None) == ["registers: expected 168 (what three warpgroups deal out), got 160"]
    assert problems(replace(kernel, registers=168), None) == []


def test_a_rule_that_names_no_kernel_is_reported(kernels):
    rules = [Rule("too_many_values", "here"), Rule("too_many_values", "elsewhere", arch="sm_80"), Rule("gone", "renamed")]
    assert unused(list(kernels.values()), rules) == ["rule 'too_many_values': expected a kernel of that name, got none",
                                                     "rule 'gone': expected a kernel of that name, got none"]


def test_hopper_instructions(sass):
    hopper = parse_sass((RECORDED / "sass_hopper.txt").read_text())
    [(symbol, arch)] = hopper
    kernel, rule = Kernel(symbol, arch, "gemm_wgmma"), Rule("gemm", "TMA feeds wgmma", requires=HOPPER)
    assert arch == "sm_90a" and hopper[symbol, arch]["HGMMA"] == 4 and hopper[symbol, arch]["UTMALDG"] == 2
    assert hopper[symbol, arch]["BRA"] == 1  # behind a predicate
    assert problems(kernel, hopper, [rule]) == []
    without = {(symbol, arch): Counter({"LDC": 1, "HGMMA": 4})}
    assert problems(kernel, without, [rule]) == ["SASS: expected UTMALDG (TMA feeds wgmma), got none"]


def test_a_multicast_load_counts_by_itself_too():
    listing = ("\t\tcode for sm_90a\n\t\tFunction : k\n"
               "        /*9050*/                   UTMALDG.2D [UR20], [UR16] ;\n"
               "        /*9260*/               @P0 UTMALDG.2D.MULTICAST [UR16], [UR14], UR4 ;\n"
               "        /*9270*/               @P1 BRA.U.ANY 0x9200 ;\n"
               "        /*9280*/                   BRA 0x9200 ;\n")
    assert parse_sass(listing) == {("k", "sm_90a"): Counter({"UTMALDG": 2, "UTMALDG.MULTICAST": 1, "BRA": 2,
                                                             "BRA.U.ANY": 1})}


@pytest.mark.parametrize(("order", "count"), [
    ("HGMMA HGMMA 1 EX2 EX2 0 EX2", 2), ("HGMMA EX2 0 EX2", 1), ("EX2 HGMMA HGMMA 1 0 EX2 EX2", 0)])
def test_exponentials_under_a_product(order, count):
    """A wait that ptxas moves above the softmax is no note and no spill: only the order of the listing tells."""
    words = {"HGMMA": "HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8].tnspB, R24, gsb0", "EX2": "MUFU.EX2 R2, R3",
             "1": "WARPGROUP.DEPBAR.LE gsb0, 0x1", "0": "WARPGROUP.DEPBAR.LE gsb0, 0x0"}
    listing = "".join(f"        /*{i:04x}*/    {words[word]} ;  /* 0x1 */\n" for i, word in enumerate(order.split()))
    sass = parse_sass(f"\t\tcode for sm_90a\n\t\tFunction : k\n{listing}\t\tFunction : after\n"
                      "        /*0000*/    MUFU.EX2 R2, R3 ;\n")
    assert sass["k", "sm_90a"]["MUFU under HGMMA"] == count and not sass["after", "sm_90a"]["MUFU under HGMMA"]
    kernel = Kernel("k", "sm_90a", "k")
    assert problems(kernel, sass, [Rule("k", "softmax", overlapped=count)]) == []
    assert problems(kernel, sass, [Rule("k", "softmax", overlapped=count + 1)]) == [
        f"SASS: expected {count + 1} exponentials under HGMMA (softmax), got {count}"]


def test_loads_that_have_sunk_below_the_first_wgmma_fail():
    listing = ("\t\tcode for sm_90a\n\t\tFunction : k\n"
               "        /*1690*/               @P4 LDG.E R201, desc[UR14][R2.64] ;\n"
               "        /*2630*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24, UP0 ;\n"
               "        /*9800*/               @P3 LDG.E R195, desc[UR14][R4.64+0x100] ;\n")
    found, kernel, rule = parse_sass(listing), Kernel("k", "sm_90a", "k"), Rule("k", "planted", early=1)
    assert found == {("k", "sm_90a"): Counter({"LDG": 2, "LDG before HGMMA": 1, "HGMMA": 1})}
    assert problems(kernel, found, [rule]) == []
    assert problems(kernel, found, [replace(rule, early=2)]) == [
        "SASS: expected 2 loads before the first wgmma (planted), got 1"]


def test_a_kernel_without_a_listing_fails(kernels, sass):
    assert problems(Kernel("_Z5otherv", "sm_90a"), sass) == ["SASS: expected a listing, got none"]
    assert problems(Kernel(EARLY, "sm_80"), sass) == ["SASS: expected a listing, got none"]


@pytest.mark.parametrize(("symbol", "name"), [
    ("_ZN5pydit4cuda44_GLOBAL__N__f2b1168a_11_modulate_cu_b9f98fe015modulate_kernelI13__nv_bfloat16Li8ELi256ELi8ELb0ELb1EEEvNS1_14ModulateParamsE",
     "modulate_kernel<__nv_bfloat16, 8, 256, 8, false, true>"),
    (EARLY, "touched_early"),
    ("main", "main"),
])
def test_names(symbol, name):
    assert demangle([symbol]) == [name]


def test_the_command_says_what_is_missing(tmp_path):
    result = subprocess.run(["/usr/bin/env", f"PATH={tmp_path}", sys.executable, "-m", "build_tools.gates"],
                            cwd=RECORDED.parents[2], capture_output=True, text=True)
    assert result.returncode == 2 and "gates: nvcc: expected it on PATH" in result.stderr


def test_a_store_that_was_split():
    """Sixteen bytes in one access pass; a rule that asks for them names how many smaller ones there are."""
    head = "code for sm_90\n  Function : k\n"
    wide, narrow = (f"        /*{at:04x}*/                   STG.E{kind} desc[UR4][R8.64], R4 ;\n"
                    for at, kind in ((16, ".128"), (32, "")))
    rule = Rule("k", "stored as one", requires=frozenset({"STG"}), forbids=frozenset({"narrow STG"}))
    kernel = Kernel("k", "sm_90", "k")
    assert problems(kernel, parse_sass(head + wide), [rule]) == []
    assert problems(kernel, parse_sass(head + wide + narrow + narrow), [rule]) == [
        "SASS: expected no narrow STG (stored as one), got 2"]
    assert problems(kernel, parse_sass(head), [rule]) == ["SASS: expected STG (stored as one), got none"]


def test_the_launcher_keeps_the_log_and_shows_the_rest(tmp_path):
    """Beside the object, as nvcc printed it; lines about single kernels are not shown, those about wgmma and errors are."""
    compiler, recorded, target = tmp_path / "nvcc", RECORDED / "ptxas_planted.txt", tmp_path / "a.o"
    compiler.write_text(f"#!/bin/sh\ncat {recorded} >&2\necho 'a.cu(3): error: expected a name'\nexit $STATUS\n")
    compiler.chmod(0o755)
    for status in (0, 3):
        done = subprocess.run(["sh", ROOT / "build_tools/keep_log.sh", compiler, "-c", "a.cu", "-o", target],
                              env={**os.environ, "STATUS": str(status)}, capture_output=True, text=True)
        kept = target.with_name("a.o.log").read_text()
        assert done.returncode == status and kept.startswith(recorded.read_text())
        shown = done.stderr.splitlines()
        assert "a.cu(3): error: expected a name" in shown and sum("(C75" in line for line in shown) == 2
        assert not [line for line in shown if "Used" in line or "stack frame" in line or "Compiling" in line]

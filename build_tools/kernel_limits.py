"""What the static gates expect of single kernels. A kernel that no rule names: no spills, no stack, no local memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

# wgmma and TMA loads, in the words of SASS: a Hopper kernel without them fell back to something else.
HOPPER = frozenset({"HGMMA", "UTMALDG"})


@dataclass(frozen=True)
class Rule:
    """Exceptions and demands for the kernels whose name, template arguments included, a regular expression finds."""

    kernel: str
    reason: str
    arch: str = ""  # "" is every architecture
    spill: int = 0  # bytes of spill stores, and of spill loads
    stack: int = 0  # bytes of stack frame; above 0 local memory may be accessed
    requires: frozenset[str] = frozenset()  # SASS instructions that must occur
    forbids: frozenset[str] = frozenset()  # SASS instructions that must not occur
    overlapped: int = 0  # exponentials that must run while a product of the warpgroup does
    early: int = 0  # loads that must stand before the first wgmma
    registers: int = 0  # of a thread at the launch; 0 is any number

    def covers(self, name: str, arch: str) -> bool:
        return self.arch in ("", arch) and re.search(self.kernel, name) is not None


RULES: tuple[Rule, ...] = (
    Rule("(joint_attention(_backward)?|second_moments|hsic_gram|grouped_linear)_sm90",
         "TMA feeds wgmma, and warpgroups trade registers", arch="sm_90a", requires=HOPPER | {"USETMAXREG"}),
    # What setmaxnreg deals out is what the launch gave the block: 128 x 24 + 256 x 240, or 128 x 40 + 256 x 232, is 384
    # x 168 registers; 128 x 32 + 384 x 160 is 512 x 128. With fewer the warpgroups that multiply would wait for good.
    Rule("(joint_attention_backward|second_moments|hsic_gram|grouped_linear)_sm90_kernel|"
         "joint_attention_sm90_kernel<.*, 128>", "what three warpgroups deal out", arch="sm_90a", registers=168),
    Rule("joint_attention_sm90_kernel<.*, (32|64)>", "what four warpgroups deal out", arch="sm_90a", registers=128),
    # Attention's consumers store from a lane that ptxas has not seen elected: with elect_one there it spills.
    Rule("(second_moments|hsic_gram|grouped_linear)_sm90_kernel", "one thread issues copies, not a loop over the lanes "
         "of a warp (see elect_one)", arch="sm_90a", forbids=frozenset({"BRA.U.ANY"})),
    Rule("(second_moments|grouped_linear)_sm90_kernel<.*, 2>", "blocks of a cluster share what they load",
         arch="sm_90a", requires=frozenset({"UTMALDG.MULTICAST", "UCGABAR_WAIT"})),
    # One per score of a thread: half the keys of a tile, and of the backward, in the last step and in all others, half
    # the queries.
    Rule("joint_attention_sm90_kernel<.*, 128>", "the softmax runs under P V", arch="sm_90a", overlapped=88),
    Rule("joint_attention_sm90_kernel<.*, (32|64)>", "the softmax runs under P V", arch="sm_90a", overlapped=64),
    Rule("joint_attention_backward_sm90_kernel", "P is made under dP", arch="sm_90a", overlapped=64),
    # nvcc splits the copy of a struct into stores of the members that it has just made
    Rule(r"(qk_norm_rope_kernel<.*, true, [12]|modulate_kernel<\w+, [48], .*)>", "16 bytes are stored as one",
         requires=frozenset({"STG"}), forbids=frozenset({"narrow STG"})),
    Rule("grouped_linear_sm90_kernel<.*, true, .>", "the bias comes during the product", arch="sm_90a", early=32),
    Rule("grouped_linear_sm90_kernel<.*, false, .>", "the bias and the gate of two slabs come during the product",
         arch="sm_90a", early=64),
)

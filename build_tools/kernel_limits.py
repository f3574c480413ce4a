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
    early: int = 0  # loads that must stand before the first wgmma

    def covers(self, name: str, arch: str) -> bool:
        return self.arch in ("", arch) and re.search(self.kernel, name) is not None


RULES: tuple[Rule, ...] = (
    Rule("(joint_attention(_backward)?|second_moments|grouped_linear)_sm90",
         "TMA feeds wgmma, and warpgroups trade registers", arch="sm_90a", requires=HOPPER | {"USETMAXREG"}),
    Rule("(second_moments|grouped_linear)_sm90_kernel<.*, 2>", "blocks of a cluster share what they load",
         arch="sm_90a", requires=frozenset({"UTMALDG.MULTICAST", "UCGABAR_WAIT"})),
    Rule("grouped_linear_sm90_kernel<.*, true, .>", "the bias comes during the product", arch="sm_90a", early=32),
    Rule("grouped_linear_sm90_kernel<.*, false, .>", "the bias and the gate of two slabs come during the product",
         arch="sm_90a", early=64),
)

"""Does the emulated suite notice when a line of an attention kernel is left out?"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from attention_cases import CASES, ODD_SIZES, Case, check_backward, check_forward
from mutants import CONFLICTS, DEADLOCK, IN_FLIGHT, MULTIPLYING, NEEDLESS, OUTSIDE, RACE, RULE, WRONG, check_killed

from minillm.ops import emulate

ALL_CASES = CASES | ODD_SIZES | {
    "decode": Case(B=2, H=4, G=4, S=70, K=40, padding="all of a row"),
    "tiles in turn": Case(T=20, S=520, K=64),
    "decode of groups": Case(B=2, H=6, G=2, S=130, K=40, padding="left"),
}  # fmt: skip


class Mutant(NamedTuple):
    without: str
    killer: str
    stage: str
    case: str = "one"


MUTANTS = {
    # attention.cuh
    11: Mutant("the future is hidden", WRONG, "v2", "7 features"),
    12: Mutant("a prefix is seen from everywhere", WRONG, "v2", "window without causal"),
    13: Mutant("what is older than the window is hidden", WRONG, "v2", "window without causal"),
    14: Mutant("padding is hidden", WRONG, "v2", "nothing to see"),
    15: Mutant("tiles of the future are not loaded", NEEDLESS, "v2", "padding left"),
    16: Mutant("tiles older than the window are not loaded", NEEDLESS, "v2", "window"),
    17: Mutant("keys after the last are none", WRONG, "v2", "short"),
    18: Mutant("tiles of padding are not loaded", NEEDLESS, "v2", "nothing to see"),
    19: Mutant("a tile with some of the future is asked key by key", WRONG, "v3", "large scores"),
    20: Mutant("a tile with keys older than the window is asked key by key", WRONG, "v3", "window without causal"),
    21: Mutant("a tile with padding is asked key by key", WRONG, "v3", "short"),
    # tiles.cuh
    31: Mutant("rows after the last are not read", OUTSIDE, "v2"),
    32: Mutant("features after the last are not read", OUTSIDE, "v2"),
    33: Mutant("what was not read is 0", WRONG, "v2"),
    34: Mutant("no infinity - infinity while nothing was seen", WRONG, "v2", "padding left"),
    35: Mutant("the sum is scaled to a new largest score", WRONG, "v2", "one query, many keys"),
    36: Mutant("the output is scaled to a new largest score", WRONG, "v2", "one query, many keys"),
    # tensor_cores.cuh
    41: Mutant("the largest score is that of all four lanes of a row", WRONG, "v3", "short"),
    42: Mutant("the sum is that of all four lanes of a row", WRONG, "v3"),
    43: Mutant("no infinity - infinity while nothing was seen", WRONG, "v3", "padding left"),
    44: Mutant("the sum is scaled to a new largest score", WRONG, "v3", "one query, many keys"),
    45: Mutant("the output is scaled to a new largest score", WRONG, "v3", "one query, many keys"),
    46: Mutant("rows after the last are not written", OUTSIDE, "v3"),
    47: Mutant("a query that sees nothing reads 0", WRONG, "v3", "nothing to see"),
    48: Mutant("features after the last are not written", OUTSIDE, "v3"),
    # swizzled.cuh
    51: Mutant("rows after the last are not read", OUTSIDE, "v4"),
    52: Mutant("features after the last are not read", OUTSIDE, "v4"),
    53: Mutant("what was not read is 0", WRONG, "v4"),
    54: Mutant("the chunks of a row change places", CONFLICTS, "v4"),
    # backward.cuh
    61: Mutant("queries before a block of keys are not loaded", NEEDLESS, "backward v1", "padding left"),
    62: Mutant("queries whose window lies after a block of keys are not loaded", NEEDLESS, "backward v1", "window"),
    63: Mutant("a warp after the last query does nothing", OUTSIDE, "backward v1"),
    # hopper.cuh
    71: Mutant("a tile begins where the swizzle's pattern does", RULE, "v5"),
    72: Mutant("the tensor cores know of the swizzle", RULE, "v5"),
    # boxes.cuh
    81: Mutant("8 rows of features lie 1024 bytes apart", WRONG, "v5", "two tiles"),
    82: Mutant("64 columns lie a box apart", WRONG, "v5", "two tiles"),
    83: Mutant("8 rows of columns lie 1024 bytes apart", WRONG, "v5", "two tiles"),
    # attention_v1.cu
    101: Mutant("a thread after the last query does nothing", OUTSIDE, "v1"),
    102: Mutant("the largest score is taken off", WRONG, "v1"),
    103: Mutant("a query that sees nothing reads 0", WRONG, "v1", "nothing to see"),
    104: Mutant("the weights are divided by their sum", WRONG, "v1", "7 features"),
    # attention_v2.cu
    201: Mutant("barrier: a tile is not replaced before all have used it", RACE, "v2", "7 features"),
    202: Mutant("barrier: a tile is not used before all of it is there", RACE, "v2"),
    203: Mutant("rows after the last are not written", OUTSIDE, "v2"),
    204: Mutant("features after the last are not written", OUTSIDE, "v2"),
    205: Mutant("a query that sees nothing reads 0", WRONG, "v2", "nothing to see"),
    # attention_v3.cu
    301: Mutant("rows after the last are not read", OUTSIDE, "v3"),
    302: Mutant("features after the last are not read", OUTSIDE, "v3"),
    303: Mutant("what was not read is 0", WRONG, "v3"),
    304: Mutant("barrier: a tile is not replaced before all have used it", RACE, "v3", "one query, many keys"),
    305: Mutant("barrier: a tile is not used before all of it is there", RACE, "v3"),
    # attention_v4.cu
    401: Mutant("the two buffers take turns", WRONG, "v4", "one query, many keys"),
    402: Mutant("wait: a tile is not used before its copies have landed", IN_FLIGHT, "v4"),
    403: Mutant("barrier: nor before those of the other threads have", RACE, "v4"),
    # attention_v5.cu
    451: Mutant("the two buffers take turns", RULE, "v5", "tiles in turn"),
    452: Mutant("no more bytes are expected than come", DEADLOCK, "v5"),
    453: Mutant("wait: a tile is not replaced before all have used it", RULE, "v5", "tiles in turn"),
    454: Mutant("the first tiles replace none", DEADLOCK, "v5"),
    455: Mutant("no fewer bytes are expected than come", RULE, "v5"),
    456: Mutant("bytes are expected before they come", RULE, "v5"),
    457: Mutant("wait: the queries are not multiplied before they are there", RACE, "v5"),
    458: Mutant("wait: nor the keys", IN_FLIGHT, "v5"),
    459: Mutant("fence: the scores' registers are free before they are multiplied into", RULE, "v5"),
    460: Mutant("the products of the scores are a group that can be waited for", MULTIPLYING, "v5"),
    461: Mutant("wait: the scores are not read before they are there", MULTIPLYING, "v5"),
    462: Mutant("wait: the values are not multiplied before they are there", IN_FLIGHT, "v5"),
    463: Mutant("fence: the weights are in their registers before they are multiplied", RULE, "v5"),
    464: Mutant("the products of the output are a group that can be waited for", MULTIPLYING, "v5"),
    465: Mutant("wait: the output is not used before it is there", MULTIPLYING, "v5"),
    466: Mutant("a buffer that all have used is free", DEADLOCK, "v5", "tiles in turn"),
    467: Mutant("fence: the copy engine sees the mbarriers", RULE, "v5"),
    468: Mutant("barrier: nobody comes to an mbarrier before it is made", RACE, "v5"),
    469: Mutant("each use of a buffer is another phase", RULE, "v5", "tiles in turn"),
    # attention_backward_v1.cu
    501: Mutant("rows after the last are not written", OUTSIDE, "backward v1"),
    502: Mutant("features after the last are not written", OUTSIDE, "backward v1"),
    503: Mutant("keys after the last are none", OUTSIDE, "backward v1", "nothing to see"),
    504: Mutant("barrier: a tile is not replaced before all have used it", RACE, "backward v1", "not causal"),
    505: Mutant("barrier: a tile is not used before all of it is there", RACE, "backward v1"),
    506: Mutant("queries after the last are none", OUTSIDE, "backward v1"),
    507: Mutant("delta, for keys and values", WRONG, "backward v1"),
    508: Mutant("queries after the last are none", OUTSIDE, "backward v1"),
    509: Mutant("barrier: a tile is not replaced before all have used it", RACE, "backward v1", "7 features"),
    510: Mutant("barrier: a tile is not used before all of it is there", RACE, "backward v1"),
    511: Mutant("delta, for queries", WRONG, "backward v1"),
    # attention_backward_v2.cu
    521: Mutant("rows after the last are not written", OUTSIDE, "backward v2"),
    522: Mutant("features after the last are not written", OUTSIDE, "backward v2"),
    523: Mutant("delta", WRONG, "backward v2"),
    524: Mutant("keys after the last are none", OUTSIDE, "backward v2", "nothing to see"),
    525: Mutant("the two buffers take turns", WRONG, "backward v2", "odd"),
    526: Mutant("wait: a tile is not used before its copies have landed", IN_FLIGHT, "backward v2"),
    527: Mutant("barrier: nor before those of the other threads have", RACE, "backward v2"),
    528: Mutant("queries after the last are none", OUTSIDE, "backward v2"),
    529: Mutant("queries after the last are none", OUTSIDE, "backward v2"),
    530: Mutant("the two buffers take turns", WRONG, "backward v2", "two tiles"),
    531: Mutant("wait: a tile is not used before its copies have landed", IN_FLIGHT, "backward v2"),
    532: Mutant("barrier: nor before those of the other threads have", RACE, "backward v2"),
    # attention_decode.cu
    601: Mutant("a warp after the last split does nothing", OUTSIDE, "decode", "decode"),
    602: Mutant("heads after the last of a group are not read", OUTSIDE, "decode", "decode"),
    603: Mutant("features of a query after the last are not read", OUTSIDE, "decode", "decode"),
    604: Mutant("features of a key after the last are not read", OUTSIDE, "decode", "decode"),
    605: Mutant("features of a value after the last are not read", OUTSIDE, "decode", "decode"),
    606: Mutant("heads after the last of a group are not written", RACE, "decode", "decode"),
    607: Mutant("features after the last are not written", RACE, "decode", "decode"),
    608: Mutant("parts are scaled to the largest score of all", WRONG, "decode", "decode of groups"),
    609: Mutant("a query that sees nothing reads 0", WRONG, "decode", "decode"),
}


def attempt(case: Case, stage: str, machine: emulate.Machine) -> None:
    """Run the kernels of `stage`, and check the numbers."""
    q, k, v, grad = case.tensors(torch.bfloat16)
    given = {"keys": case.keys(), **case.rules()}
    if stage in ("backward v1", "backward v2"):
        o, lse = emulate.attention(q, k, v, **given)
        stage = stage.removeprefix("backward ")
        grads = emulate.attention_backward(grad, q, k, v, o, lse, stage=stage, machine=machine, **given)
        check_backward(case, q, k, v, grad, grads)
    elif stage == "decode":
        check_forward(case, q, k, v, *emulate.attention_decode(q, k, v, splits=3, machine=machine, **given))
    else:
        check_forward(case, q, k, v, *emulate.attention(q, k, v, stage=stage, machine=machine, **given))


@pytest.mark.parametrize("number", MUTANTS)
def test_a_mutant_is_killed(number):
    _, killer, stage, name = MUTANTS[number]
    case = replace(ALL_CASES[name], H=ALL_CASES[name].G)  # fewer heads are as good, but in decoding
    case = ALL_CASES[name] if stage == "decode" else case
    check_killed(number, killer, partial(attempt, case, stage))

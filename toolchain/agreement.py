"""The bounds of a check, which the doctor on a board has too: board/agreement.py."""

from board.agreement import (
    GAP,
    LEAST_UPDATE,
    NOISE,
    RISE,
    Agreement,
    Noise,
    Rows,
    centred,
    cosines,
    divergence,
    explained,
    logit_errors,
    rises,
    update_errors,
)

__all__ = [
    *("GAP", "LEAST_UPDATE", "NOISE", "RISE", "Agreement", "Noise", "Rows", "centred", "cosines", "divergence"),
    *("explained", "logit_errors", "rises", "update_errors"),
]

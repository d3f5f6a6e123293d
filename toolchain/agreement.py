"""The bounds of a check, which the doctor on a board has too."""

from board.agreement import GAP as GAP
from board.agreement import LEAST_UPDATE as LEAST_UPDATE
from board.agreement import NOISE as NOISE
from board.agreement import RISE as RISE
from board.agreement import Agreement as Agreement
from board.agreement import Noise as Noise
from board.agreement import Rows as Rows
from board.agreement import centred as centred
from board.agreement import cosines as cosines
from board.agreement import divergence as divergence
from board.agreement import explained as explained
from board.agreement import logit_errors as logit_errors
from board.agreement import rises as rises
from board.agreement import update_errors as update_errors

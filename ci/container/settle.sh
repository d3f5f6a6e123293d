# Makes what pip installed the same each time: bytecode is compiled anew from files whose times no longer change.
set -eu

find /opt/axc /axc -name __pycache__ -prune -exec rm -rf {} +
find /opt/axc -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
cd /axc
PYTHONHASHSEED=0 /opt/axc/bin/python -c '
from requirements.install import SETS
for name in ("build", "reference"):
    exec(SETS[name].proof)
'
rm -rf /axc/requirements/__pycache__

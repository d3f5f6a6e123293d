# Makes pip's installation reproducible: recompiles the bytecode from files with fixed timestamps.
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

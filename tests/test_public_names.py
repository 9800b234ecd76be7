"""The public names are promises: adding one is a decision, losing one breaks users."""

import subprocess
import sys


def test_importing_trimtab_imports_no_torch():
    code = "import sys, trimtab; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""The doctor: finds what is wrong with a log and its server, and names the line that cures each finding.

`examine()` looks at a log that `Backend.init()` may refuse, over connections of its own. It changes nothing, and waits
for no lock for longer than half a second. Each module from `server` to `retention` has checks, which are pure: they get
rows, and give findings. docs/doctor.md has a heading for each check.
"""

from pgbackend.doctor.examination import Examination, examine
from pgbackend.doctor.finding import SEVERITIES, Finding, Severity
from pgbackend.doctor.look import Limits

__all__ = ["SEVERITIES", "Examination", "Finding", "Limits", "Severity", "examine"]

"""What all tests share: nothing in them is a matter of luck, or of how busy the machine is.

Hypothesis tries the same examples in every run of the same code, and does not judge by the clock.
`--hypothesis-profile=explore` has it look for new ones.
"""

from __future__ import annotations

import tqdm
from hypothesis import HealthCheck, settings

_ANY_TIME = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("jaxserve", _ANY_TIME, derandomize=True)
settings.register_profile("explore", _ANY_TIME)
settings.load_profile("jaxserve")

# The thread that looks after bars warns when they come and go meanwhile, and warnings are errors.
tqdm.tqdm.monitor_interval = 0

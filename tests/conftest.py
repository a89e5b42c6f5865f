"""Settings for all tests."""

import os

from hypothesis import settings

# How long an example takes depends on what else the machine does. CI tries the same examples each
# time, as hypothesis does by itself there.
settings.register_profile("without_deadline", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("without_deadline")

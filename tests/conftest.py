"""Settings for all tests."""

import os

from hypothesis import settings

# Examples have no deadline, because other load on the machine makes them slow. CI tries the same
# examples each time, which is the default of hypothesis there.
settings.register_profile("without_deadline", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("without_deadline")

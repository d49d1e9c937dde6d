"""What flows: bytes -> samples -> batches -> steps -> scores."""

import os
import sys

# Ray reads RAY_AUTH_MODE once, when it is first imported; set later, its processes and this one would disagree. An
# entry point of a Ray job has the mode of its cluster.
if "ray" not in sys.modules and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
    os.environ.setdefault("RAY_AUTH_MODE", "token")

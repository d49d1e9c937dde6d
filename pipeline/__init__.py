"""The pipeline: bytes -> samples -> batches -> steps -> scores."""

import os
import sys

# Ray reads RAY_AUTH_MODE when it is first imported. If it were set later, Ray's processes would use another mode than
# this one. The entry point of a Ray job has the mode of its cluster.
if "ray" not in sys.modules and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
    os.environ.setdefault("RAY_AUTH_MODE", "token")

"""Run by Prefect's Python: the example's flow, once per set of parameters; prints what became of each as JSON."""

import json
import sys

sys.path.insert(0, sys.argv[1])
import topt_nightly

topt_nightly.predict = topt_nightly.predict.with_options(retry_delay_seconds=0)
became = [topt_nightly.topt_nightly(**params, return_state=True).type.value for params in json.loads(sys.argv[2])]
print(json.dumps(became), file=sys.stderr)

"""Run by Airflow's Python: the example's DAG, once per set of parameters; prints what became of each as JSON."""

import json
import sys
from datetime import timedelta

sys.path.insert(0, sys.argv[1])
import topt_nightly

dag = topt_nightly.topt_nightly()
dag.task_dict["predict"].retry_delay = timedelta(0)
became = []
for params in json.loads(sys.argv[2]):
    run = dag.test(run_conf=params)
    (ti,) = run.get_task_instances()
    became.append({"state": str(run.state.value), "tries": ti.try_number})
print(json.dumps(became), file=sys.stderr)

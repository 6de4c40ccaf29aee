"""topt-run for spark-submit, which takes only what is called .py for Python. Exit codes are topt-run's own.

    spark-submit --master yarn examples/spark/topt_run.py predict s3://city-data/regions \
        --bundle /shared/model.topt --out s3://city-data/predictions --engine spark
"""

from topt_deploy.runtime.cli import main

main()

#!/bin/sh
# Predictions of all cities every night, from cron (./crontab). cron mails what this prints: nothing, unless there is
# something for a person to do. $TOPT_HOME holds cities/, model.topt, log/ and metrics/; out/ is made.
#
# topt-run's exit codes: 0 done. 3 done in part: said, and counts as done. 74, 75 (and 137, killed, 143, terminated) are the machine's
# fault or another run's: once more after $TOPT_WAIT_S seconds. Any other is said and passed on.
# No flock here: topt-run locks what it writes, and --resume passes over what is done.
set -u
cd "${TOPT_HOME:=/srv/topt}" || exit 66
log=log/$(date +%F).jsonl

run() {
    topt-run predict cities/ --bundle model.topt --out out/ --resume --on-bad-row quarantine \
        --log-format json --metrics-file metrics/topt.prom >>"$log" 2>&1
}

run
code=$?
case $code in
74 | 75 | 137 | 143)
    sleep "${TOPT_WAIT_S:=600}"
    run
    code=$?
    ;;
esac

case $code in
0) ;;
3)
    echo "topt-run: done in part, see $TOPT_HOME/out/_run.json"
    code=0
    ;;
*)
    echo "topt-run: exit code $code, see $TOPT_HOME/$log, which ends with:"
    tail -n 3 "$log"
    ;;
esac
exit $code

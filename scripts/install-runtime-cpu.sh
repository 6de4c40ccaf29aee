#!/bin/sh
# install-runtime-cpu.sh DIR: installs the wheel in DIR with what prediction and prompt encoding on a CPU need.
set -eu
python3 -m pip install --quiet --constraint constraints.txt "$(ls "$1"/topt_deploy-*.whl)[cpu,encoder]"
sh "$(dirname "$0")/remove-unused.sh"

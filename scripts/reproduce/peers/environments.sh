# Sourced by ptq.sh and interop.sh: a virtual environment for each peer, of the versions that the results were made with.
# GPTQModel is a source distribution, which is built against the torch that is there.

environment() {
    local peer=$1 venvs=$2 python=$3 torch=${TORCH:-torch==2.13.0} packages
    case $peer in
        llmcompressor) packages=(llmcompressor==0.14.0.1) ;;
        autoround) packages=(auto-round==0.16.1) ;;
        gptqmodel) packages=(gptqmodel==7.6.0 optimum==2.3.0) ;;
    esac
    [ -f "$venvs/$peer/installed" ] && return
    echo "installing $peer (minutes, once)"
    "$python" -m venv "$venvs/$peer" \
        && "$venvs/$peer/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" numpy setuptools wheel \
        && "$venvs/$peer/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" "${packages[@]}" \
        && touch "$venvs/$peer/installed"
}

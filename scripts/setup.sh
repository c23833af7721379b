# A virtual environment in .venv with this project in it. Sourced by the other scripts, from the checkout's root.
# EXTRAS is what to install beyond the tool itself: "", "[test]" or "[bench]".
python=${PYTHON:-python3}
# Images of containers often set this. Every process would then compile all that it imports: PyTorch and TVM, ten seconds.
unset PYTHONDONTWRITEBYTECODE
[ -d .venv ] || "$python" -m venv .venv
. .venv/bin/activate
if [ -z "${SAEVIT_TVM_SET_UP:-}" ]; then # else all is there, as CI says
    pip install -qq --upgrade pip
    # What is imported is compiled then: most never is, and to compile all takes a minute.
    pip install -qq --no-compile --editable ".${EXTRAS:-}"
    # Without torchvision, which would bring a PyTorch with CUDA: for the zoo, names of it are enough.
    case "${EXTRAS:-}" in *test* | *bench*) pip install -qq --no-compile --no-deps timm==1.0.31 ;; esac
fi

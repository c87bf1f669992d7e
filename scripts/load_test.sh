#!/bin/sh
# guidellm, in an environment of its own under .load/, against a server of the bundled model.
# usage: load_test.sh VENV [guidellm options]
set -eu
venv=$1
shift
folder=.load
port=${KVKEEP_LOAD_PORT:-8017}

if [ ! -x "$folder/venv/bin/guidellm" ]; then
    "$venv/bin/python" -m venv "$folder/venv"
    "$folder/venv/bin/python" -m pip install --quiet guidellm
fi
tokenizer=$("$venv/bin/python" -c 'import kvkeep.bundled, pathlib; print(pathlib.Path(next(iter(kvkeep.bundled.__path__))) / "tiny")')

"$venv/bin/kvkeep" serve tiny --port "$port" --status 0 2>"$folder/server.log" &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true' EXIT
until "$venv/bin/python" -c "import httpx; httpx.get('http://127.0.0.1:$port/health').raise_for_status()" 2>/dev/null; do
    kill -0 "$server" || { cat "$folder/server.log"; exit 1; }
    sleep 1
done

# Nothing is fetched: the tokenizer is the bundled model's.
HF_HUB_OFFLINE=1 "$folder/venv/bin/guidellm" run --disable-progress \
    --backend "kind=openai_http,target=http://127.0.0.1:$port" \
    --tokenizer "kind=hf_auto,model=$tokenizer" \
    --data "kind=synthetic_text,prompt_tokens=256,output_tokens=32,turns=3" \
    --profile "kind=concurrent,streams=8" \
    --constraint "kind=max_duration,seconds=30" \
    --output "kind=console" "$@"

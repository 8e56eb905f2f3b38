"""Runs in a process that has llama.cpp (xllamacpp) and nothing of ours: serves a GGUF file and says what it answers.

A JSON request on stdin: `model`, `lora` (or null), `prompts` (lists of token numbers), `texts`, `chats` (lists of
messages), `ends` (texts of one token). JSON on stdout: `logprobs` (after each prompt, of every word), `tokens` (of each
text), `rendered` (each chat, by the template in the file), `ended` (whether an answer ends at each of `ends`). A file
that llama.cpp refuses ends the process.
"""

import json
import os
import sys
import urllib.request


def main() -> None:
    request = json.loads(sys.stdin.read())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 512, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = params.n_threads_http = 1
    # Nothing rounded that need not be.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if request.get("lora"):
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(request["lora"], 1.0)]
    server = xllamacpp.Server(params)

    def ask(path, body):
        call = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(call, timeout=60) as answer:
            return json.load(answer)

    def logprobs(prompt):
        # Whatever is generated, a whole letter is: half a one would not be reported. The probabilities are the model's.
        letter = ask("/tokenize", {"content": "a", "add_special": False})["tokens"][-1]
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": request["words"], "logit_bias": [[letter, 1e6]]}
        found = ask("/completion", asked | {"cache_prompt": False})["completion_probabilities"][0]["top_logprobs"]
        return {each["id"]: each["logprob"] for each in found}

    def tokens(text):
        asked = {"content": text, "add_special": True, "parse_special": True}
        return ask("/tokenize", asked)["tokens"]

    def ended(text):
        forced = [ask("/tokenize", {"content": text, "parse_special": True})["tokens"][-1], 1e6]
        return ask("/completion", {"prompt": [1], "n_predict": 2, "logit_bias": [forced]})["stop_type"] == "eos"

    found = {
        "logprobs": [logprobs(prompt) for prompt in request["prompts"]],
        "tokens": [tokens(text) for text in request["texts"]],
        "rendered": [ask("/apply-template", {"messages": chat})["prompt"] for chat in request["chats"]],
        "ended": [ended(text) for text in request.get("ends", ())],
    }
    json.dump(found, answers)
    answers.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

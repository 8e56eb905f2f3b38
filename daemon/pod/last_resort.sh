#!/bin/sh
# The net under the net: supervisord's second event listener, which needs no Python. It acts when the first one
# (daemon.pod.supervisor_listener) cannot run, as where the environment that it shares with the daemon is broken: it stops the pod,
# and where that fails, or this is no pod, it ends supervisord, and with it the container.

stop_pod() {
    for words in "stop pod" "pod stop"; do
        # shellcheck disable=SC2086
        runpodctl $words "$RUNPOD_POD_ID" >&2 && return 0
    done
    for key in "$RUNPOD_API_KEY" "$TRAINER_RUNPOD_API_KEY"; do
        # The key by stdin: whoever lists processes sees arguments.
        [ -n "$key" ] && printf 'header = "Authorization: Bearer %s"\n' "$key" | curl --silent --fail --max-time 20 \
            --config - --json '{"action": "stop"}' --output /dev/null \
            "${TRAINER_RUNPOD_API:-https://api.runpod.io/v2}/pods/$RUNPOD_POD_ID/action" && return 0
    done
    return 1
}

while :; do
    printf 'READY\n'
    read -r header || exit 0
    payload=$(dd bs=1 count="${header##*len:}" 2>/dev/null)
    case "$payload" in
    *"processname:pod "*)
        if [ -z "$RUNPOD_POD_ID" ] || ! stop_pod; then
            kill -TERM "$PPID"
        fi
        ;;
    esac
    printf 'RESULT 2\nOK'
done

#!/bin/bash
# The image's entry: supervisord, with an output that it can open. It opens /dev/fd/1 anew for each program, which is
# refused where that is another user's pipe or a socket, as the runtime likes; then it gets a pipe of our own, and cat
# passes on what comes. The lines of the last instant may be lost that way, so it is not done where it need not be.
conf="$(dirname "$0")/../../supervisord.conf"
if { : >>/dev/fd/1; } 2>/dev/null; then
    exec supervisord -n -c "$conf"
fi
exec supervisord -n -c "$conf" > >(exec cat) 2>&1

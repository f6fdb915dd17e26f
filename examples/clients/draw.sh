#!/bin/sh
# Draw one image with curl and save it: sh examples/clients/draw.sh CONTROL.png CLASS OUT.png [SERVER]
# Needs curl and python3 (to take the PNG out of the JSON). CAR_TOKEN, if set, is sent along.
set -eu
server=${4:-http://127.0.0.1:8080}
curl --fail-with-body --silent --show-error ${CAR_TOKEN:+-H "Authorization: Bearer $CAR_TOKEN"} \
  -F "control=@$1" -F "class=$2" -F seed=7 "$server/v1/pictures" |
  python3 -c 'import base64, json, sys; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["images"][0]["png"]))' \
  > "$3"
echo "$3"

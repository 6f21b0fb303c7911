#!/bin/sh
# A certificate authority of one's own and a certificate for the gateway, in ./tls. For trying out: a real edge has a real certificate.
set -eu
cd "$(dirname "$0")"
umask 077
mkdir -p tls
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj '/CN=Keyward example CA' \
    -addext 'basicConstraints=critical,CA:TRUE' -addext 'keyUsage=critical,keyCertSign' -keyout tls/ca-key.pem -out tls/ca.pem 2>/dev/null
openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj '/CN=llm.example' -keyout tls/key.pem -out tls/request.pem 2>/dev/null
printf 'subjectAltName=DNS:llm.example,DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\nauthorityKeyIdentifier=keyid\n' |
    openssl x509 -req -in tls/request.pem -CA tls/ca.pem -CAkey tls/ca-key.pem -CAcreateserial -days 30 -extfile /dev/stdin -out tls/certificate.pem 2>/dev/null
rm tls/ca-key.pem tls/request.pem
echo "tls/ca.pem signs tls/certificate.pem for llm.example and localhost"

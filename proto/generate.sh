#!/usr/bin/env bash
# Write the stubs again from the .proto files. grpcio-tools is pinned (1.81.1): its output runs under protobuf 6 and 7.
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -m grpc_tools.protoc -Iflashdiff/proto=proto --python_out=. --pyi_out=. --grpc_python_out=. proto/v1/*.proto

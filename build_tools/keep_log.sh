#!/bin/sh
# A compiler's launcher: runs nvcc and keeps what it prints as OBJECT.log, which build_tools/gates.py reads; what is not
# about a single kernel is shown.
object=
previous=
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
[ -n "$object" ] || exec "$@"
"$@" >"$object.log" 2>&1
status=$?
grep -v -e '^ptxas info  *: [0-9]* bytes gmem' -e '^ptxas info  *: Compiling entry function' \
  -e '^ptxas info  *: Function properties for' -e '^ptxas info  *: Used ' -e '^ptxas info  *: Compile time' \
  -e '^  *[0-9]* bytes stack frame' "$object.log" >&2
exit $status

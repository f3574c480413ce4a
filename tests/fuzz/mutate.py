"""Seeded corruption of files: a seed and the original's bytes give the same wrong file every time.

What is wrong ranges from a flipped bit to a header that is complete, consistent and announces 10^12 elements. Some
results are still right: what reads them may take them or refuse them, in one sentence.
"""

import copy
import io
import json
import pickle
import random
import struct
import tarfile
import zipfile

VALUES = (None, True, False, -1, 0, 1, 2, 7, 10**6, 10**12, 2**63, -(2**70), 1.5, -0.0, 1e300, float("nan"), float("inf"),
          "", "0", "x" * 300, "../../x", "/etc/passwd", "\ud800", "\x00", "é" * 3, [], {}, [[]], [None], [0, 10**12],
          [[0, 10**12]], [[1, 2]], [3, 1], {"a": 1}, [True], ["1"], [1.5], [[1, 2, 3]], 10**30)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "U64",
          "F6_E2M3", "F8_E8M0", "X", "", None, 7, ["F32"])
SIZES = (-1, 0, 1, 3, 2**31, 10**12, 2**62, 2**63, 2**64, 10**30, 1.5, float("inf"), "8", None, True)


def pickles():
    """What a pickle looks like: alone, by several protocols, and in the archive that torch.save writes."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"x": 1}, 2))
        file.writestr("archive/version", b"3\n")
    legacy = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}))
    return [pickle.dumps({"x": 1}, protocol) for protocol in range(6)] + [archive.getvalue(), legacy]


def _paths(node, path=()):
    yield path
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from _paths(child, (*path, key))


def tree(data, rng, changes=None):
    """A copy of a JSON tree with one to three things wrong."""
    data = json.loads(json.dumps(data))
    for _ in range(changes or rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(_paths(data)))
        if not path:
            if rng.random() < 0.2:
                return copy.deepcopy(rng.choice(VALUES))
            path = (rng.choice(list(data)),) if isinstance(data, dict) and data else ()
            if not path:
                return copy.deepcopy(rng.choice(VALUES))
        parent = data
        for key in path[:-1]:
            parent = parent[key]
        key, what = path[-1], rng.randrange(7)
        if what == 0:
            del parent[key]
        elif what == 1 and isinstance(parent, dict):
            parent[rng.choice(("", "x", "version", "format", "../x", "0", key + " "))] = copy.deepcopy(parent[key])
        elif what == 1:
            parent.append(copy.deepcopy(parent[key]))
        elif what == 2 and isinstance(parent[key], (int, float)):
            parent[key] = rng.choice((parent[key] + rng.choice((-2, -1, 1, 2)), -parent[key], str(parent[key]),
                                      float(parent[key])))
        elif what == 3:
            parent[key] = [parent[key]]
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return data


def raw(content, rng):
    """Bytes with something wrong that knows nothing of a format."""
    what = rng.randrange(10)
    if what == 0:
        return content[:rng.randrange(len(content) + 1)]
    if what == 1:
        return content + rng.randbytes(rng.choice((1, 8, 1000)))
    if what == 2:
        return rng.choice(pickles())
    if what == 3:
        return rng.choice((b"", b"[" * 100_000, b'{"a":' * 100_000, b"7" * 5000, b"\xef\xbb\xbf" + content, b"null", b'"',
                           content.decode("latin-1").encode("utf-16"), b"\x00" * len(content), b"NaN", b"\x80"))
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 30))):
        place = rng.randrange(min(len(changed), rng.choice((16, 200, len(changed)))))
        if what == 4:
            changed[place] ^= 1 << rng.randrange(8)
        elif what == 5:
            changed[place] = rng.randrange(256)
        elif what == 6:
            del changed[place:place + rng.choice((1, 8))]
        elif what == 7:
            changed[place:place] = rng.randbytes(rng.choice((1, 8)))
        else:
            stop = place + rng.choice((8, 64))
            changed[place:stop] = bytes(len(changed[place:stop]))
        if not changed:
            break
    return bytes(changed)


def json_file(content, seed):
    """A wrong JSON file: three in four are JSON."""
    rng = random.Random(seed)
    if rng.randrange(4) == 0:
        return raw(content, rng)
    return json.dumps(tree(json.loads(content), rng)).encode()


def parts(content):
    """(header, payload) of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8:8 + length]), content[8 + length:]


def join(header, payload):
    """The safetensors file of a header (a tree, or bytes as they are) and a payload."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def safetensors_file(content, seed):
    """A wrong safetensors file: most have a header that can be read, and say in it what is not so."""
    rng = random.Random(seed)
    header, payload = parts(content)
    what = rng.randrange(16)
    if what < 2:
        return raw(content, rng)
    if what == 2:
        length = rng.choice((0, 1, 7, len(content), len(content) - 8, 2**31, 2**63, 2**64 - 1, rng.randrange(len(content))))
        return struct.pack("<Q", length) + content[8:]
    if what == 3:
        return join(raw(json.dumps(header).encode(), rng), payload)
    if what == 4:
        return join(tree(header, rng), payload)
    if what == 5:
        header["__metadata__"] = tree(header.get("__metadata__", {"a": "b"}), rng)
        return join(header, payload)
    if what == 6:  # values: valid, and none that anyone wrote
        changed = bytearray(payload)
        for _ in range(rng.choice((1, 10, 200))):
            place = rng.randrange(0, max(1, len(changed) - 8), 8)
            changed[place:place + 8] = rng.choice((b"\xff" * 8, b"\x00" * 8, struct.pack("<d", float("nan")), rng.randbytes(8),
                                                   struct.pack("<d", 1e308), struct.pack("<q", 10**12)))
        return join(header, bytes(changed))
    names = [name for name in header if name != "__metadata__"]
    for name in rng.sample(names, min(len(names), rng.choice((1, 1, 2, len(names))))):
        entry = header[name]
        start, stop = entry["data_offsets"]
        if what == 7:
            entry["dtype"] = rng.choice(DTYPES)
        elif what == 8 and entry["shape"]:
            entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(SIZES)
        elif what == 9:
            entry["shape"] = rng.choice(([], [0], [2**32, 2**32], [1] * 70, [10**12], entry["shape"][::-1], "8", None, 3,
                                         [entry["shape"]], [*entry["shape"], 1], [2**31, 2**33, 0]))
        elif what == 10:
            entry["data_offsets"] = rng.choice((
                [stop, start], [start, start], [0, len(payload)], [start, 10**12], [10**12, 10**12 + stop - start],
                [start - 4, stop - 4], [start + 4, stop + 4], [0, stop - start], [start], [], None, "0", [start, stop, stop],
                [float(start), float(stop)], [str(start), str(stop)], [-stop, -start], [start, float("inf")], [None, None],
                [2**63, 2**64], [False, True]))
        elif what == 11:
            del header[name]
        elif what == 12:
            header[rng.choice(("x", "", f"{name}.x", "../x", name[:-1], name.replace("0", "9")))] = header.pop(name)
        elif what == 13:
            other = rng.choice(names)
            if other in header:
                header[name], header[other] = header[other], header[name]
        elif what == 14:  # a tensor that is consistent in itself and larger than the file
            count = rng.choice((10**6, 10**9, 10**12))
            header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [start, start + 4 * count]}
        else:  # another type and shape of the same bytes
            header[name] = {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
    return join(header, payload)


def tar_file(content, seed):
    """A wrong shard: members that lead elsewhere, that announce what is not there, that hold no image."""
    rng = random.Random(seed)
    what = rng.randrange(8)
    if what == 0:
        return raw(content, rng)
    if what == 1:  # in the header of a member: name, size, checksum, type
        changed = bytearray(content)
        for _ in range(rng.choice((1, 2, 4))):
            start = 512 * rng.randrange(len(changed) // 512)
            place = start + rng.choice((0, 100, 124, 135, 148, 156, 157, 257, 345))
            changed[place:place + rng.choice((1, 4, 8))] = rng.randbytes(4)
        return bytes(changed[:len(content)])
    stream = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(fileobj=stream, mode=rng.choice(("w", "w", "w:gz", "w:xz", "w:bz2"))) as tar:
        for member, data in members:
            if rng.random() < 0.4:
                if what == 2:
                    member.name = rng.choice(("../" + member.name, "/etc/" + member.name, "a/../../" + member.name, "", "..",
                                              "\udcff.png", "a" * 300 + ".png", member.name.upper(), "." + member.name))
                elif what == 3:
                    member.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE,
                                              tarfile.DIRTYPE, tarfile.CONTTYPE, b"Z"))
                    member.linkname = rng.choice(("/etc/passwd", "../../x", member.name, "000.png"))
                    data = b"" if rng.random() < 0.7 else data
                elif what == 4:  # sparse: 10^12 bytes in the place of a few
                    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                                          "GNU.sparse.realsize": str(rng.choice((10**9, 10**12))),
                                          "GNU.sparse.name": member.name}
                    data = b"1\n0\n4\n".ljust(512, b"\0") + data
                else:
                    data = raw(data, rng) if data else data
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found = stream.getvalue()
    return raw(found, rng) if what == 7 else found

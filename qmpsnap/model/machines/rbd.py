"""Images of a Ceph cluster, as a spec names them, as QEMU opens them, and as ``rbd`` is asked about them."""

import json
from typing import Any, Final, Self

import msgspec
from msgspec import Struct

PREFIX: Final = "json:"


class RbdImage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One image of a pool, or a snapshot of it.

    Attributes:
        namespace: of the pool; None for its default one.
        conf: absolute path of the cluster's configuration; None for the one that librados finds.
        user: Ceph's user, without ``client.``; its key comes from the keyring that the configuration names.
        snapshot: of the image, which then is read-only; no spec has one.
    """

    pool: str
    image: str
    namespace: str | None = None
    conf: str | None = None
    user: str | None = None
    snapshot: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Options of its node (QAPI ``BlockdevOptionsRbd``), JSON-ready."""
        some = {"namespace": self.namespace, "conf": self.conf, "user": self.user, "snapshot": self.snapshot}
        return {"driver": "rbd", "pool": self.pool, "image": self.image} | {k: v for k, v in some.items() if v}

    @property
    def filename(self) -> str:
        """QEMU's own name for its raw node, which the header of an overlay has to have; see :data:`_ORDER`."""
        options = self.options
        ordered = {key: options[key] for key in _ORDER if key in options}
        return PREFIX + json.dumps({"driver": "raw", "file": ordered}, ensure_ascii=False)

    @classmethod
    def parse(cls, filename: str) -> Self | None:
        """The image of such a name; None where it is another one."""
        if not filename.startswith(PREFIX):
            return None
        try:
            file = json.loads(filename.removeprefix(PREFIX))["file"]
            found = msgspec.convert({key: value for key, value in file.items() if key != "driver"}, cls)
        except (ValueError, KeyError, TypeError, AttributeError):  # msgspec's is a ValueError
            return None
        return found if found.filename == filename else None

    @property
    def client(self) -> list[str]:
        """Arguments of Ceph's programs that say which cluster is meant, and as whom."""
        return _given(conf=self.conf, id=self.user)

    @property
    def arguments(self) -> list[str]:
        """Arguments that name it to ``rbd``."""
        named = _given(pool=self.pool, namespace=self.namespace, image=self.image, snap=self.snapshot)
        return [*self.client, *named]

    def __str__(self) -> str:
        name = "/".join(part for part in (self.pool, self.namespace, self.image) if part)
        return f"{name}@{self.snapshot}" if self.snapshot else name


_ORDER: Final = ("pool", "image", "conf", "snapshot", "driver", "namespace", "user")
"""Of the keys in QEMU's own name; a name with another order counts as an override, and each layer above repeats it."""


def _given(**values: str | None) -> list[str]:
    return [f"--{key}={value}" for key, value in values.items() if value]


def shown(path: str) -> str:
    """A layer's path for people."""
    image = RbdImage.parse(path)
    return f"rbd:{image}" if image else path

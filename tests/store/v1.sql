-- A store of schema 1, frozen: one machine, two layers, one snapshot. Never changed; newer code must read it.
PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
CREATE TABLE disk (
        machine INTEGER NOT NULL REFERENCES machine (id) ON DELETE CASCADE, name TEXT NOT NULL,
        position INTEGER NOT NULL, active TEXT NOT NULL REFERENCES layer (id) DEFERRABLE INITIALLY DEFERRED,
        version INTEGER NOT NULL DEFAULT 1, PRIMARY KEY (machine, name)
    ) STRICT;
INSERT INTO "disk" VALUES(1,'vda',0,'vda-2',2);
CREATE TABLE layer (
        id TEXT PRIMARY KEY, pool TEXT NOT NULL, path TEXT NOT NULL, format TEXT NOT NULL,
        backing TEXT REFERENCES layer (id) DEFERRABLE INITIALLY DEFERRED, virtual_size INTEGER NOT NULL,
        device INTEGER NOT NULL, inode INTEGER NOT NULL, owned INTEGER NOT NULL, state TEXT NOT NULL,
        version INTEGER NOT NULL DEFAULT 1, UNIQUE (pool, path)
    ) STRICT;
INSERT INTO "layer" VALUES('vda-1','machines','web/vda-1.qcow2','qcow2',NULL,1048576,2049,777,1,'ok',1);
INSERT INTO "layer" VALUES('vda-2','machines','web/vda-2.qcow2','qcow2','vda-1',1048576,2049,778,1,'ok',1);
CREATE TABLE machine (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, uuid TEXT NOT NULL UNIQUE, host TEXT NOT NULL,
        spec TEXT NOT NULL, created REAL NOT NULL,
        current INTEGER REFERENCES snapshot (id) DEFERRABLE INITIALLY DEFERRED,
        version INTEGER NOT NULL DEFAULT 1
    ) STRICT;
INSERT INTO "machine" VALUES(1,'web','6a8c0f2e-5d1b-4c3a-9e7f-0123456789ab','oldhost','{"name":"web","machine":"pc-q35-7.2","disks":[{"name":"vda","size":1048576}]}',1700000000.25,1,2);
CREATE TABLE operation (
        id INTEGER PRIMARY KEY, machine TEXT NOT NULL, verb TEXT NOT NULL, state TEXT NOT NULL, step TEXT NOT NULL,
        plan TEXT NOT NULL, started REAL NOT NULL, updated REAL NOT NULL, pid INTEGER NOT NULL, error TEXT,
        version INTEGER NOT NULL DEFAULT 1
    ) STRICT;
INSERT INTO "operation" VALUES(1,'web','define','settled','settled','{"type":"define","machine":"web","images":[{"id":"vda-1","path":"/pool/machines/web/vda-1.qcow2","format":"qcow2","backing":null,"virtual_size":1048576,"device":0,"inode":0,"owned":true,"state":"ok"}],"overlays":[],"change":{"layers":[{"id":"vda-1","path":"/pool/machines/web/vda-1.qcow2","format":"qcow2","backing":null,"virtual_size":1048576,"device":0,"inode":0,"owned":true,"state":"ok"}],"active":{"vda":"vda-1"}},"variables":null}',1700000000.25,1700000000.5,4000,NULL,2);
INSERT INTO "operation" VALUES(2,'web','create','settled','settled','{"type":"create","machine":"web","live":true,"overlays":[{"disk":"vda","layer":{"id":"vda-2","path":"/pool/machines/web/vda-2.qcow2","format":"qcow2","backing":"vda-1","virtual_size":1048576,"device":0,"inode":0,"owned":true,"state":"ok"},"backing":{"id":"vda-1","path":"/pool/machines/web/vda-1.qcow2","format":"qcow2","backing":null,"virtual_size":1048576,"device":0,"inode":0,"owned":true,"state":"ok"}}],"change":{"layers":[{"id":"vda-2","path":"/pool/machines/web/vda-2.qcow2","format":"qcow2","backing":"vda-1","virtual_size":1048576,"device":0,"inode":0,"owned":true,"state":"ok"}],"active":{"vda":"vda-2"},"snapshots":[{"name":"before","kind":"disk","state":"ok","parent":null,"created":1700000001.5,"description":"a note","mode":"live","points":[{"disk":"vda","layer":"vda-1","tag":null}],"operation":2,"pause_ms":null}],"current":"before"}}',1700000001.25,1700000001.75,4001,NULL,3);
CREATE TABLE point (
        snapshot INTEGER NOT NULL REFERENCES snapshot (id) ON DELETE CASCADE, disk TEXT NOT NULL,
        position INTEGER NOT NULL, layer TEXT NOT NULL REFERENCES layer (id) DEFERRABLE INITIALLY DEFERRED, tag TEXT,
        PRIMARY KEY (snapshot, disk)
    ) STRICT;
INSERT INTO "point" VALUES(1,'vda',0,'vda-1',NULL);
CREATE TABLE process (
        machine INTEGER PRIMARY KEY REFERENCES machine (id) ON DELETE CASCADE, pid INTEGER NOT NULL,
        start_ticks INTEGER NOT NULL, boot_id TEXT NOT NULL, started REAL NOT NULL, accel TEXT NOT NULL,
        qemu_version TEXT NOT NULL, version INTEGER NOT NULL DEFAULT 1
    ) STRICT;
INSERT INTO "process" VALUES(1,4242,123456,'b0071d',1700000002.5,'tcg','7.2.22',1);
CREATE TABLE serial (last INTEGER NOT NULL) STRICT;
INSERT INTO "serial" VALUES(2);
CREATE TABLE snapshot (
        id INTEGER PRIMARY KEY, machine INTEGER NOT NULL REFERENCES machine (id) ON DELETE CASCADE,
        name TEXT NOT NULL, kind TEXT NOT NULL, state TEXT NOT NULL,
        parent INTEGER REFERENCES snapshot (id) DEFERRABLE INITIALLY DEFERRED, created REAL NOT NULL,
        description TEXT NOT NULL, mode TEXT NOT NULL, pause_ms REAL, operation INTEGER NOT NULL,
        version INTEGER NOT NULL DEFAULT 1, UNIQUE (machine, name)
    ) STRICT;
INSERT INTO "snapshot" VALUES(1,1,'before','disk','ok',NULL,1700000001.5,'a note','live',3.75,2,1);
CREATE INDEX layer_backing ON layer (backing);
CREATE INDEX point_layer ON point (layer);
CREATE INDEX operation_open ON operation (machine, state);
COMMIT;
PRAGMA user_version=1;
PRAGMA journal_mode=WAL;

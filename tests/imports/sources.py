"""Descriptions of machines: recorded from libvirt 9.0 on QEMU 7.2, or written as their manager's documentation says."""

from pathlib import Path

RECORDED = Path(__file__).with_name("recorded")
FOLDER = "/srv/images"
"""Where the recorded machines have their images."""

PROXMOX = """\
# Web server%3A the one that counts
agent: 1
bios: ovmf
boot: order=scsi0;ide2;net0
cipassword: $5$supersecret
cores: 2
cpu: x86-64-v2-AES,flags=+pcid
efidisk0: local:100/vm-100-disk-1.raw,efitype=4m,pre-enrolled-keys=1,size=528K
hostpci0: 0000:01:00
ide0: local:100/vm-100-cloudinit.qcow2,media=cdrom
ide2: local:iso/debian-12.iso,media=cdrom,size=629M
machine: pc-q35-8.1+pve0
memory: 2048
meta: creation-qemu=8.1.5,ctime=1700000000
name: Web.Server
net0: virtio=BC:24:11:AA:BB:CC,bridge=vmbr0,firewall=1,tag=5
net1: e1000=BC:24:11:AA:BB:CD,bridge=vmbr1
numa: 0
ostype: l26
parent: before-upgrade
scsi0: local:100/vm-100-disk-0.qcow2,cache=writeback,discard=on,iothread=1,size=32G
scsi1: big:100/vm-100-disk-2.raw,backup=0,size=1G,ro=1
scsihw: virtio-scsi-single
smbios1: uuid=0f0e0d0c-1234-4321-9876-0123456789ab,manufacturer=QQ==
sockets: 2
unused0: local:100/vm-100-disk-9.qcow2
vmgenid: 11111111-2222-3333-4444-555555555555

[before-upgrade]
#it worked
#here
cores: 2
machine: pc-q35-8.1+pve0
memory: 2048
parent: fresh
runningmachine: pc-q35-8.1+pve0
scsi0: local:100/vm-100-disk-0.qcow2,cache=writeback,discard=on,iothread=1,size=32G
scsihw: virtio-scsi-single
snaptime: 1700000200
vmstate: local:100/vm-100-state-before-upgrade.raw

[fresh]
memory: 2048
scsi0: local:100/vm-100-disk-0.qcow2,size=32G
snaptime: 1700000100

[PENDING]
memory: 4096
"""
EVERYWHERE = "0.0.0.0"  # noqa: S104 - what QEMU does without an address
STORAGE = {"local": "/var/lib/vz", "big": "/mnt/big"}


def recorded(name: str) -> bytes:
    return (RECORDED / name).read_bytes()

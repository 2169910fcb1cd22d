//! A VM's TAP with a real QEMU at the other end. Needs root, `qemu-system-x86_64`, a static busybox, cpio, and a Debian
//! cloud kernel in `/boot` with its modules. A guest boots in about two seconds under TCG.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::tests::{in_namespace, number, numbered, send};
use super::*;
use crate::port::kept::Kept;
use crate::port::packet::Opened;
use crate::port::{Burst, RxQueue, Sent, TxQueue, VnetHdr};
use crate::sys::peer_pid;

/// In the order of loading.
const MODULES: [&str; 8] = [
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
];
/// A guest that answers pings and echoes TCP on port 7.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
for m in /m/*.ko; do /bin/busybox insmod $m; done
/bin/busybox ip link set eth0 up
/bin/busybox ip address add 10.0.0.2/24 dev eth0
exec /bin/busybox nc -ll -p 7 -e /bin/cat
";

fn kernel() -> (PathBuf, PathBuf) {
    let mut found: Vec<String> = fs::read_dir("/lib/modules")
        .expect("modules")
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|v| Path::new(&format!("/boot/vmlinuz-{v}")).exists())
        .collect();
    found.sort();
    let v = found
        .pop()
        .expect("needs a kernel in /boot with modules (linux-image-cloud-amd64)");
    (
        format!("/boot/vmlinuz-{v}").into(),
        format!("/lib/modules/{v}/kernel").into(),
    )
}

fn initramfs(dir: &Path, modules: &Path) -> PathBuf {
    let root = dir.join("root");
    for d in ["bin", "m", "dev"] {
        fs::create_dir_all(root.join(d)).expect("mkdir");
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("needs busybox-static");
    std::os::unix::fs::symlink("busybox", root.join("bin/cat")).expect("link");
    for (i, m) in MODULES.iter().enumerate() {
        fs::copy(
            modules.join(format!("{m}.ko")),
            root.join(format!("m/{i}.ko")),
        )
        .expect("module");
    }
    fs::write(root.join("init"), INIT).expect("init");
    let pack = "chmod 755 init && find . | cpio --quiet -o -H newc > ../initramfs";
    let done = Command::new("sh")
        .args(["-c", pack])
        .current_dir(&root)
        .status();
    assert!(done.expect("sh").success(), "needs cpio");
    dir.join("initramfs")
}

struct Vm {
    child: Child,
    qmp: BufReader<UnixStream>,
    _dir: tempfile::TempDir,
}

impl Vm {
    fn boot(device: &str) -> Vm {
        let dir = tempfile::tempdir().expect("tempdir");
        let (kernel, modules) = kernel();
        let initramfs = initramfs(dir.path(), &modules);
        let socket = dir.path().join("qmp");
        let child = Command::new("qemu-system-x86_64")
            .args("-accel tcg,thread=multi -machine pc -cpu qemu64 -m 128 -smp 1".split(' '))
            .args("-nodefaults -no-user-config -display none -append".split(' '))
            .arg("quiet tsc=reliable no_timer_check panic=1")
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args([
                "-qmp",
                &format!("unix:{},server=on,wait=off", socket.display()),
            ])
            .args([
                "-netdev",
                &format!("tap,id=n0,ifname={device},script=no,downscript=no"),
            ])
            .args([
                "-device",
                "virtio-net-pci,netdev=n0,mac=02:00:00:00:00:99,romfile=",
            ])
            .stdin(Stdio::null())
            .spawn()
            .expect("needs qemu-system-x86_64");
        let end = Instant::now() + Duration::from_secs(20);
        let qmp = loop {
            match UnixStream::connect(&socket) {
                Ok(s) => break s,
                Err(e) => assert!(Instant::now() < end, "QMP: {e}"),
            }
            thread::sleep(Duration::from_millis(20));
        };
        let mut vm = Vm {
            child,
            qmp: BufReader::new(qmp),
            _dir: dir,
        };
        vm.line();
        vm.qmp("qmp_capabilities");
        vm
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.qmp.read_line(&mut line).expect("QMP answers");
        line
    }

    fn qmp(&mut self, command: &str) {
        let order = format!("{{\"execute\": \"{command}\"}}\n");
        self.qmp
            .get_mut()
            .write_all(order.as_bytes())
            .expect("QMP takes orders");
        while !self.line().contains("\"return\"") {}
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Two ports and nothing between: what comes in on one goes out on the other, held while that is full.
struct Wire {
    stop: Arc<AtomicBool>,
    gso: Arc<[AtomicUsize; 2]>,
    thread: JoinHandle<[Port; 2]>,
}

type Port = (Box<dyn RxQueue>, Box<dyn TxQueue>);

impl Wire {
    fn start(mut ports: [Port; 2]) -> Wire {
        let stop = Arc::new(AtomicBool::new(false));
        let gso: Arc<[AtomicUsize; 2]> = Arc::default();
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&gso));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let [a, b] = &mut ports;
                let moved = forward(&mut *a.0, &mut *b.1, &counted[0])
                    + forward(&mut *b.0, &mut *a.1, &counted[1]);
                if moved == 0 {
                    thread::sleep(Duration::from_micros(100));
                }
            }
            ports
        });
        Wire { stop, gso, thread }
    }

    fn stop(self) -> [Port; 2] {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("no panic")
    }
}

fn forward(rx: &mut dyn RxQueue, tx: &mut dyn TxQueue, gso: &AtomicUsize) -> usize {
    let mut burst = Burst::new();
    rx.burst(&mut burst);
    let mut done = 0;
    for frame in &burst {
        match tx.send(frame) {
            Sent::Full => break,
            Sent::Yes if frame.vnet.gso_type() != 0 => _ = gso.fetch_add(1, Ordering::Relaxed),
            Sent::Yes | Sent::Down => {}
            Sent::Never(why) => panic!("{why:?}: {frame:?}"),
        }
        done += 1;
    }
    drop(burst);
    tx.flush();
    rx.release(done);
    done
}

fn connect_to_guest() -> TcpStream {
    let guest: SocketAddr = "10.0.0.2:7".parse().expect("address");
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        match TcpStream::connect_timeout(&guest, Duration::from_millis(500)) {
            Ok(s) => return s,
            Err(e) => assert!(Instant::now() < end, "the guest does not answer: {e}"),
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Sends `bytes` bytes to the guest's echo server and compares what comes back.
fn echo(bytes: usize) {
    let mut stream = connect_to_guest();
    let timeout = Some(Duration::from_secs(30));
    stream.set_read_timeout(timeout).expect("timeout");
    let data: Vec<u8> = (0..bytes).map(|i| (i * 31 + i / 251) as u8).collect();
    let sent = data.clone();
    let mut out = stream.try_clone().expect("clone");
    let sender = thread::spawn(move || out.write_all(&sent).expect("send"));
    let mut back = vec![0; bytes];
    stream.read_exact(&mut back).expect("the echo comes back");
    sender.join().expect("sender");
    assert!(back == data, "the echo differs");
}

/// What comes back of a stopped VM's TAP: what QEMU has taken, and what was still in the queue.
fn all_back(tap: &VmTap) -> (Vec<u32>, Vec<u32>) {
    let (mut taken, mut queued) = (vec![], vec![]);
    while let Some(back) = tap.take_back().expect("take back") {
        taken.extend(back.taken.iter().filter_map(|f| number(&f.1)));
        queued.extend(back.queued.iter().filter_map(|f| number(&f.1)));
    }
    (taken, queued)
}

#[test]
fn a_vm_talks_through_its_tap_and_what_a_pause_leaves_is_read_back() {
    in_namespace(|| {
        let tap = VmTap::create("v0").expect("create");
        let endpoint = open_endpoint("t0").expect("endpoint");
        let ip = Command::new("ip")
            .args("address add 10.0.0.1/24 dev t0".split(' '))
            .status();
        assert!(ip.expect("ip").success());
        let mut vm = Vm::boot("v0");

        let pid = peer_pid(vm.qmp.get_ref()).expect("peer");
        assert_eq!(pid, vm.child.id());
        tap.adopt(pid, 1).expect("adopt");
        assert!(matches!(
            tap.adopt(1, 1),
            Err(TapError::NotTheReader { pid: 1, .. })
        ));

        // TCP with checksum and segmentation offload from end to end, in both directions.
        let vm_side = tap.queues(&Kept::default()).expect("queues");
        let wire = Wire::start([(vm_side.rx, vm_side.tx), (endpoint.rx, endpoint.tx)]);
        echo(4 << 20);
        let gso = [0, 1].map(|i| wire.gso[i].load(Ordering::Relaxed));
        assert!(gso[0] > 0 && gso[1] > 0, "no segmentation offload: {gso:?}");

        // An ordered stop: no more frames, the queue drains, then the VM stops with nothing left behind.
        let [(rx, mut tx), host] = wire.stop();
        tap.remember();
        for n in 0..300 {
            let frame = numbered(n, 100);
            while send(&mut *tx, VnetHdr::default(), &frame) == Sent::Full {
                thread::yield_now();
            }
        }
        let start = Instant::now();
        tap.mark().expect("marks");
        assert!(tap.wait_empty(Duration::from_secs(5)));
        let drained = start.elapsed();
        vm.qmp("stop");
        assert_eq!(
            all_back(&tap),
            (vec![], vec![]),
            "QEMU has read both marks: nothing is stuck"
        );

        // Fresh queues with the whole credit.
        drop((rx, tx));
        let Opened { mut rx, mut tx, .. } = tap.queues(&Kept::default()).expect("queues");
        // A stop by somebody else: 400 frames to the paused VM come back, but for the one that QEMU keeps; and it reads no mark.
        tap.remember();
        for n in 0..400 {
            assert_eq!(
                send(&mut *tx, VnetHdr::default(), &numbered(n, 100)),
                Sent::Yes
            );
        }
        thread::sleep(Duration::from_millis(200));
        tap.mark().expect("marks");
        assert!(!tap.wait_empty(Duration::from_millis(200)));
        let (taken, queued) = all_back(&tap);
        eprintln!(
            "drained in {drained:?}; read back {} of 400; GSO frames {gso:?}",
            queued.len()
        );
        assert_eq!(taken, [0], "QEMU has one");
        assert_eq!(queued, (1..400).collect::<Vec<_>>());

        // The same with one frame: nothing is left but marks.
        vm.qmp("cont");
        vm.qmp("stop");
        tap.remember();
        let sent = send(&mut *tx, VnetHdr::default(), &numbered(1000, 100));
        assert_eq!(sent, Sent::Yes);
        thread::sleep(Duration::from_millis(200));
        assert_eq!(tap.queue_empty(), Some(true), "QEMU has it");
        tap.mark().expect("marks");
        assert!(!tap.wait_empty(Duration::from_millis(50)));
        assert_eq!(all_back(&tap), (vec![1000], vec![]));
        assert_eq!(tap.queue_empty(), Some(true), "the marks are gone");

        // It goes on as if nothing had been.
        vm.qmp("cont");
        let mut burst = Burst::new();
        rx.burst(&mut burst);
        let stale = burst.len();
        drop(burst);
        rx.release(stale);
        let wire = Wire::start([(rx, tx), host]);
        echo(1 << 20);
        let [(_rx, mut tx), _host] = wire.stop();

        // Killed: the port is down as soon as the duplicate is given back.
        vm.child.kill().expect("kill");
        vm.child.wait().expect("wait");
        assert!(tap.reader_exited());
        tap.release_dup();
        assert_eq!(
            send(&mut *tx, VnetHdr::default(), &numbered(1, 100)),
            Sent::Down
        );
        tap.delete().expect("delete");
        assert!(tap.carrier().is_err());
    });
}

//! PURE: the bytes of the file. Described in docs/formats/fdb.md.
//!
//! Invariant: no bytes of the file panic, and none make it take more memory than a few times what the file is long.

use gangway_shared::id::MacAddr;

use crate::spool::crc32c;

const MAGIC: &[u8; 8] = b"GWADDRS\n";
const VERSION: u32 = 1;
/// Bytes of the header.
pub const HEADER: usize = 64;
const ADDRESS: usize = 12;

/// A port as it was configured then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptPort {
    /// Its name.
    pub name: String,
    /// Its VM.
    pub vm: Option<String>,
}

/// An address that was known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptAddress {
    /// The address.
    pub mac: MacAddr,
    /// Which of the file's ports it was at.
    pub port: u16,
    /// Seconds since it was last seen, when the file was written.
    pub age_s: u32,
}

/// All that a file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// The host's boot in which it was written (`/proc/sys/kernel/random/boot_id`).
    pub boot: [u8; 16],
    /// When, in seconds of `CLOCK_BOOTTIME`.
    pub at_s: u64,
    /// In the order in which addresses name them.
    pub ports: Vec<KeptPort>,
    /// Each with a port that is there.
    pub addresses: Vec<KeptAddress>,
}

/// Ports and their VMs, and then addresses, as many as come.
pub fn encode(
    boot: [u8; 16],
    at_s: u64,
    ports: &[KeptPort],
    addresses: impl Iterator<Item = KeptAddress>,
) -> Vec<u8> {
    let mut b = vec![0; HEADER];
    for p in ports {
        for text in [p.name.as_str(), p.vm.as_deref().unwrap_or_default()] {
            // Longer than any that a configuration may have; cut, it is the name of no port.
            let text = text.as_bytes();
            let text = text.get(..usize::from(u16::MAX)).unwrap_or(text);
            b.extend_from_slice(&(text.len() as u16).to_le_bytes());
            b.extend_from_slice(text);
        }
    }
    let names = (b.len() - HEADER) as u32;
    let mut count = 0u32;
    for a in addresses {
        b.extend_from_slice(&a.mac.0);
        b.extend_from_slice(&a.port.to_le_bytes());
        b.extend_from_slice(&a.age_s.to_le_bytes());
        count += 1;
    }
    let sum = crc32c(&b[HEADER..]);
    b[0..8].copy_from_slice(MAGIC);
    b[8..12].copy_from_slice(&VERSION.to_le_bytes());
    b[12..16].copy_from_slice(&(HEADER as u32).to_le_bytes());
    b[16..32].copy_from_slice(&boot);
    b[32..40].copy_from_slice(&at_s.to_le_bytes());
    b[40..44].copy_from_slice(&(ports.len() as u32).to_le_bytes());
    b[44..48].copy_from_slice(&names.to_le_bytes());
    b[48..52].copy_from_slice(&count.to_le_bytes());
    b[52..56].copy_from_slice(&sum.to_le_bytes());
    let sum = crc32c(&b[..HEADER - 4]);
    b[HEADER - 4..HEADER].copy_from_slice(&sum.to_le_bytes());
    b
}

/// What a file says; `Err`: what is wrong with it.
pub fn decode(b: &[u8]) -> Result<Kept, String> {
    let Some((head, body)) = b.split_first_chunk::<HEADER>() else {
        return Err(format!("{} bytes are no list of addresses", b.len()));
    };
    let mut head = Reader(head);
    if head.array::<8>()? != *MAGIC {
        return Err("not a list of addresses".into());
    }
    let version = head.u32()?;
    if version != VERSION {
        return Err(format!(
            "format version {version}, this program reads {VERSION}"
        ));
    }
    let header = head.u32()?;
    let boot = head.array()?;
    let at_s = u64::from_le_bytes(head.array()?);
    let [ports, names, addresses, body_sum] =
        [head.u32()?, head.u32()?, head.u32()?, head.u32()?].map(|n| n as usize);
    let _ = head.u32()?;
    if header as usize != HEADER || b.get(..HEADER - 4).map(crc32c) != Some(head.u32()?) {
        return Err("the header's checksum is wrong".into());
    }
    if crc32c(body) as usize != body_sum {
        return Err("the checksum is wrong".into());
    }
    let Some((names, list)) = body.split_at_checked(names) else {
        return Err("it is shorter than it says".into());
    };
    if addresses.checked_mul(ADDRESS) != Some(list.len()) {
        return Err(format!(
            "{addresses} addresses do not fit {} bytes",
            list.len()
        ));
    }
    let (mut names, mut found) = (Reader(names), Vec::new());
    while !names.0.is_empty() {
        let (name, vm) = (names.text()?, names.text()?);
        let vm = (!vm.is_empty()).then_some(vm);
        found.push(KeptPort { name, vm });
    }
    if found.len() != ports {
        return Err(format!("{} ports instead of {ports}", found.len()));
    }
    let mut list = Reader(list);
    let address = |_| {
        let a = KeptAddress {
            mac: MacAddr(list.array()?),
            port: u16::from_le_bytes(list.array()?),
            age_s: list.u32()?,
        };
        match usize::from(a.port) < found.len() {
            true => Ok(a),
            false => Err(format!("{} is at port {} of {ports}", a.mac, a.port)),
        }
    };
    let addresses = (0..addresses).map(address).collect::<Result<_, String>>()?;
    Ok(Kept {
        boot,
        at_s,
        ports: found,
        addresses,
    })
}

/// Takes from the front.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let Some((first, rest)) = self.0.split_first_chunk() else {
            return Err("it ends too early".into());
        };
        self.0 = rest;
        Ok(*first)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn text(&mut self) -> Result<String, String> {
        let len = u16::from_le_bytes(self.array()?);
        let split = self.0.split_at_checked(usize::from(len));
        let (text, rest) = split.ok_or("a name ends too early")?;
        self.0 = rest;
        String::from_utf8(text.to_vec()).map_err(|_| "a name is no text".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kept() -> Kept {
        let port = |name: &str, vm: Option<&str>| KeptPort {
            name: name.into(),
            vm: vm.map(str::to_owned),
        };
        let address = |n, port, age_s| KeptAddress {
            mac: MacAddr([2, 0, 0, 0, 0, n]),
            port,
            age_s,
        };
        Kept {
            boot: std::array::from_fn(|n| n as u8),
            at_s: 0x0102_0304,
            ports: vec![port("p0", Some("web")), port("up0", None)],
            addresses: vec![address(1, 0, 0), address(2, 1, 299)],
        }
    }

    fn bytes(k: &Kept) -> Vec<u8> {
        encode(k.boot, k.at_s, &k.ports, k.addresses.iter().copied())
    }

    /// `UPDATE=1 cargo test` writes it, if there is a reason.
    #[test]
    fn the_bytes_are_those_of_version_1() {
        let hex: String = bytes(&kept()).iter().map(|b| format!("{b:02x}")).collect();
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/src/addresses/fdb-v1.hex");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(file, hex.clone() + "\n").unwrap();
        }
        assert_eq!(hex + "\n", std::fs::read_to_string(file).unwrap());
        assert_eq!(decode(&bytes(&kept())), Ok(kept()));
    }

    #[test]
    fn any_damage_is_found() {
        let good = bytes(&kept());
        for n in 0..good.len() {
            assert!(decode(&good[..n]).is_err(), "cut at {n}");
            let mut bad = good.clone();
            bad[n] ^= 0x10;
            assert!(decode(&bad).is_err(), "byte {n}");
        }
        let longer = [good.as_slice(), &[0; 12]].concat();
        assert!(decode(&longer).is_err());
        let mut newer = good;
        newer[8] = 2;
        assert!(decode(&newer).unwrap_err().contains("version 2"));
    }

    #[test]
    fn an_address_at_no_port_is_refused() {
        let mut k = kept();
        k.addresses[1].port = 2;
        assert!(decode(&bytes(&k)).unwrap_err().contains("port 2 of 2"));
    }

    proptest! {
        /// Behind checksums that are right: whatever is read is what would be written.
        #[test]
        fn any_bytes_are_refused_or_read(
            body in proptest::collection::vec(prop_oneof![3 => 0u8..4, 1 => any::<u8>()], 0..60),
            counts: [u8; 3],
        ) {
            let mut b = encode([7; 16], 9, &[], std::iter::empty());
            b.extend_from_slice(&body);
            let sum = crc32c(&body);
            let counts = counts.map(|n| u32::from(n % 40));
            for (n, value) in counts.into_iter().chain([sum]).enumerate() {
                b[40 + 4 * n..44 + 4 * n].copy_from_slice(&value.to_le_bytes());
            }
            let sum = crc32c(&b[..HEADER - 4]);
            b[HEADER - 4..HEADER].copy_from_slice(&sum.to_le_bytes());
            if let Ok(kept) = decode(&b) {
                prop_assert_eq!(bytes(&kept), b);
            }
        }

        #[test]
        fn what_is_written_is_read(
            boot: [u8; 16],
            at_s: u64,
            ports in proptest::collection::vec(("[a-z]{1,20}", proptest::option::of("[a-z]{1,9}")), 1..9),
            addresses in proptest::collection::vec((any::<[u8; 6]>(), any::<u16>(), any::<u32>()), 0..99),
        ) {
            let ports: Vec<_> = ports.into_iter().map(|(name, vm)| KeptPort { name, vm }).collect();
            let address = |(mac, port, age_s)| KeptAddress { mac: MacAddr(mac), port: port % ports.len() as u16, age_s };
            let addresses = addresses.into_iter().map(address).collect();
            let k = Kept { boot, at_s, ports: ports.clone(), addresses };
            prop_assert_eq!(decode(&bytes(&k)), Ok(k));
        }
    }
}

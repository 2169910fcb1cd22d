//! Where the hosts are: `hosts.toml`. Unknown keys are refused with their line and the nearest known key.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use gangway_shared::config::valid::TlsFiles;
use gangway_shared::pki::is_name;
use serde::Deserialize;

use crate::exit::Failure;
use crate::nearest::hint;

/// The file, checked.
#[derive(Debug, Clone, Default)]
pub struct Hosts {
    /// Where it was read.
    pub path: PathBuf,
    /// `[[host]]`, in the file's order.
    pub hosts: Vec<Host>,
    /// `[tls]`, the coordinator's own certificate: needed for hosts that are reached over QUIC.
    pub tls: Option<TlsFiles>,
    /// `[[group]]`.
    pub groups: Vec<Group>,
}

/// A host and the way to its switch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// As in its certificate.
    pub name: String,
    /// How to reach it.
    pub way: Way,
    /// `address`, also if `socket` is used for control: where another switch ships to.
    pub address: Option<SocketAddr>,
}

/// How a switch is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// QUIC.
    Quic(SocketAddr),
    /// Its unix socket, on this machine.
    Unix(PathBuf),
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Way::Quic(a) => write!(f, "{a}"),
            Way::Unix(p) => write!(f, "{}", p.display()),
        }
    }
}

/// A named group.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// Its VMs.
    pub vms: Vec<String>,
}

const TOP: &[&str] = &["host", "tls", "group"];
const HOST: &[&str] = &["name", "address", "socket"];
const TLS: &[&str] = &["cert", "key", "ca", "crl"];
const GROUP: &[&str] = &["name", "vms"];

impl Hosts {
    /// Reads and checks the file.
    pub fn read(path: &Path) -> Result<Hosts, Failure> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            Failure::usage(format!(
                "cannot read the hosts file {}: {e}; name it with --hosts or GANGWAY_HOSTS",
                path.display()
            ))
        })?;
        Hosts::parse(path, &text)
    }

    /// Checks a file's text. Relative paths in it are relative to the file's folder.
    pub fn parse(path: &Path, text: &str) -> Result<Hosts, Failure> {
        let at = |span: Option<std::ops::Range<usize>>, what: String| {
            let line = span.map_or(1, |s| {
                1 + text[..s.start.min(text.len())].matches('\n').count()
            });
            Failure::usage(format!("{}:{line}: {what}", path.display()))
        };
        let raw: RawHosts = match toml::from_str(text) {
            Ok(raw) => raw,
            Err(e) => {
                let message = e.message();
                return Err(at(e.span(), with_nearest(message)));
            }
        };
        let folder = path.parent().unwrap_or(Path::new("."));
        let mut out = Hosts {
            path: path.to_owned(),
            ..Hosts::default()
        };
        for (i, h) in raw.host.into_iter().enumerate() {
            let span = Some(h.name.span());
            let name = h.name.into_inner();
            let bad = |what: String| at(span.clone(), format!("host '{name}': {what}"));
            if !is_name(&name) {
                return Err(at(
                    span,
                    format!("host number {}: '{name}' is not a name: {NAME_RULE}", i + 1),
                ));
            }
            if out.hosts.iter().any(|o| o.name == name) {
                return Err(bad("there is another host of this name".into()));
            }
            let address = match h.address {
                None => None,
                Some(a) => Some(a.parse().map_err(|_| {
                    bad(format!(
                        "address '{a}' is not ADDRESS:PORT, for example \"192.0.2.1:7600\""
                    ))
                })?),
            };
            let way = match (h.socket, address) {
                (Some(s), _) => Way::Unix(folder.join(s)),
                (None, Some(a)) => Way::Quic(a),
                (None, None) => {
                    return Err(bad(
                        "needs address = \"IP:PORT\" or socket = \"/path\"".into()
                    ));
                }
            };
            if matches!(way, Way::Quic(_)) && raw.tls.is_none() {
                return Err(bad(
                    "is reached over QUIC, so [tls] with cert, key and ca is needed".into(),
                ));
            }
            out.hosts.push(Host { name, way, address });
        }
        out.tls = raw.tls.map(|t| TlsFiles {
            cert: folder.join(t.cert),
            key: folder.join(t.key),
            ca: folder.join(t.ca),
            crl: t.crl.map(|c| folder.join(c)),
        });
        out.groups = raw.group;
        for g in &out.groups {
            if g.vms.is_empty() {
                return Err(at(None, format!("group '{}' has no vms", g.name)));
            }
        }
        Ok(out)
    }

    /// The host of this name.
    pub fn find(&self, name: &str) -> Result<&Host, Failure> {
        self.hosts.iter().find(|h| h.name == name).ok_or_else(|| {
            let hint = hint(name, self.hosts.iter().map(|h| h.name.as_str()));
            Failure::usage(format!(
                "{} knows no host '{name}'{hint}",
                self.path.display()
            ))
        })
    }
}

/// What a host or VM may be called.
pub const NAME_RULE: &str =
    "1 to 63 of A-Z a-z 0-9 . _ -, beginning and ending with a letter or digit";

/// Adds the nearest key to serde's "unknown field `x`, expected one of ...".
fn with_nearest(message: &str) -> String {
    let one_line = message.replace('\n', " ");
    let Some(rest) = message.strip_prefix("unknown field `") else {
        return one_line;
    };
    let Some((key, expected)) = rest.split_once('`') else {
        return one_line;
    };
    let keys = [TOP, HOST, TLS, GROUP]
        .into_iter()
        .find(|keys| keys.iter().all(|k| expected.contains(&format!("`{k}`"))))
        .unwrap_or(&[]);
    format!("unknown key '{key}'{}", hint(key, keys.iter().copied()))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHosts {
    #[serde(default)]
    host: Vec<RawHost>,
    tls: Option<RawTls>,
    #[serde(default, deserialize_with = "groups")]
    group: Vec<Group>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHost {
    name: toml::Spanned<String>,
    address: Option<String>,
    socket: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTls {
    cert: PathBuf,
    key: PathBuf,
    ca: PathBuf,
    crl: Option<PathBuf>,
}

fn groups<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Vec<Group>, D::Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Raw {
        name: String,
        vms: Vec<String>,
    }
    let raw = Vec::<Raw>::deserialize(d)?;
    Ok(raw
        .into_iter()
        .map(|r| Group {
            name: r.name,
            vms: r.vms,
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Hosts, String> {
        Hosts::parse(Path::new("/etc/gangway/hosts.toml"), text).map_err(|f| f.message)
    }

    #[test]
    fn a_good_file() {
        let h = parse(
            "[[host]]\nname = \"a\"\naddress = \"10.0.0.1:7600\"\n[[host]]\nname = \"b\"\nsocket = \"b.sock\"\n\
             [tls]\ncert = \"c.pem\"\nkey = \"/k\"\nca = \"ca\"\ncrl = \"ca.crl\"\n[[group]]\nname = \"g\"\nvms = [\"x\"]\n",
        )
        .expect("good");
        assert_eq!(h.hosts[1].way, Way::Unix("/etc/gangway/b.sock".into()));
        let tls = h.tls.as_ref().expect("tls");
        assert_eq!(tls.key, PathBuf::from("/k"));
        assert_eq!(tls.crl, Some("/etc/gangway/ca.crl".into()));
        assert!(
            h.find("aa")
                .expect_err("unknown")
                .message
                .contains("did you mean 'a'")
        );
    }

    #[test]
    fn unknown_keys_name_their_line_and_the_nearest() {
        let e = parse("\n[[host]]\nname = \"a\"\nadress = \"10.0.0.1:1\"\n").expect_err("typo");
        assert_eq!(
            e,
            "/etc/gangway/hosts.toml:4: unknown key 'adress'; did you mean 'address'?"
        );
        let e = parse("[tsl]\n").expect_err("typo");
        assert_eq!(
            e,
            "/etc/gangway/hosts.toml:1: unknown key 'tsl'; did you mean 'tls'?"
        );
    }

    #[test]
    fn garbage_is_one_line() {
        for text in [
            "\u{0}",
            "[[host]]\nname = 3",
            "host = 1",
            "[[host]]\nname = \"\"",
            "[[host]]\nname=\"a\"\naddress=\"x\"",
            "[[host]]\nname=\"a\"",
        ] {
            let e = parse(text).expect_err(text);
            assert!(
                e.starts_with("/etc/gangway/hosts.toml:") && !e.contains('\n'),
                "{e}"
            );
        }
    }
}

//! `gangway flows`.

use super::Context;
use crate::cli::{Format, OfHost};
use crate::exit::Failure;
use crate::table::{bytes, json, num, show, table};

pub async fn exec(cx: &Context, c: OfHost) -> Result<(), Failure> {
    let mut links = cx.switch(&c.host)?.links().await?;
    links.sort_by(|a, b| {
        b.payload_bytes
            .cmp(&a.payload_bytes)
            .then_with(|| (&a.from, &a.to).cmp(&(&b.from, &b.to)))
    });
    if c.output.output == Format::Json {
        return json(&links);
    }
    let mut t = table(&[
        "from", "vm", "to", "vm", "frames", "bytes", "payload", "idle ms",
    ]);
    for l in links {
        t.add_row(vec![
            l.from.into(),
            l.from_vm.unwrap_or_default().into(),
            l.to.into(),
            l.to_vm.unwrap_or_default().into(),
            num(l.frames),
            num(bytes(l.bytes)),
            num(bytes(l.payload_bytes)),
            num(l.idle_ms),
        ]);
    }
    show(&t);
    Ok(())
}

//! `gangway plan`.

use super::Context;
use super::group::find;
use crate::cli::{PlanArgs, PlanFormat};
use crate::exit::Failure;
use crate::graph::draw;
use crate::table::json;

pub async fn exec(cx: &Context, c: PlanArgs) -> Result<(), Failure> {
    let found = find(
        &cx.hosts()?,
        &c.group,
        c.from.as_deref(),
        c.order.as_deref(),
    )
    .await?;
    let picture = match c.output {
        PlanFormat::Json => return json(&found.plan),
        PlanFormat::Text => draw::text(&found.plan),
        PlanFormat::Dot => draw::dot(&found.plan),
        PlanFormat::Mermaid => draw::mermaid(&found.plan),
        PlanFormat::Svg => draw::svg(&found.plan),
    };
    anstream::print!("{picture}");
    Ok(())
}

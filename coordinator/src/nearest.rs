//! "Did you mean": the known name that is nearest to an unknown one.

use gangway_shared::config::raw::nearest;

/// `; did you mean 'x'?`, or the list of what there is.
pub fn hint<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.into_iter().collect();
    match nearest(name, &known) {
        Some(k) => format!("; did you mean '{k}'?"),
        None if known.is_empty() => "; there is none".to_owned(),
        None => format!("; there is: {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_found_and_a_stranger_is_not() {
        assert_eq!(
            hint("prodcuer", ["producer", "middle"]),
            "; did you mean 'producer'?"
        );
        assert_eq!(hint("b", ["a-long-name"]), "; there is: a-long-name");
        assert_eq!(hint("b", []), "; there is none");
    }
}

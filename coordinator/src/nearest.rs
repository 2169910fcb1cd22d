//! "Did you mean": the known name that is nearest to an unknown one.

/// The nearest of `known`, if one is near enough to be a slip of the fingers.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|k| (strsim::damerau_levenshtein(name, k), k))
        .filter(|(d, k)| *d <= 1 + k.len().max(name.len()) / 4)
        .min()
        .map(|(_, k)| k)
}

/// `; did you mean 'x'?`, or the list of what there is.
pub fn hint<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.into_iter().collect();
    match nearest(name, known.iter().copied()) {
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
        assert_eq!(nearest("prodcuer", ["producer", "middle"]), Some("producer"));
        assert_eq!(nearest("xyz", ["producer", "middle"]), None);
        assert_eq!(hint("b", ["a-long-name"]), "; there is: a-long-name");
        assert_eq!(hint("b", []), "; there is none");
    }
}

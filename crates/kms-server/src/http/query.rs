//! The query of a request, read as leniently as IBM's clients need: flags in any case, lists with commas or repeated,
//! an empty value the same as none.

use super::problem::Problem;
use crate::ops::Error;
use crate::store::KeyState;

#[derive(Debug, Default)]
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    pub(super) fn parse(text: &str) -> Query {
        let pairs = form_urlencoded::parse(text.as_bytes()).into_owned();
        Query(pairs.filter(|(_, value)| !value.is_empty()).collect())
    }

    /// The first value of `name`.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn flag(&self, name: &'static str) -> Result<Option<bool>, Problem> {
        self.text(name)
            .map(|text| match text.to_ascii_lowercase().as_str() {
                "true" => Ok(true),
                "false" => Ok(false),
                _ => Err(wrong(name, "must be true or false")),
            })
            .transpose()
    }

    pub(super) fn number(
        &self,
        name: &'static str,
        default: u32,
        most: u32,
    ) -> Result<u32, Problem> {
        let Some(text) = self.text(name) else { return Ok(default) };
        match text.parse::<u32>() {
            Ok(number) if number <= most => Ok(number),
            _ => Err(wrong(name, &format!("must be a number from 0 to {most}"))),
        }
    }

    /// Key states, each once; by default all but destroyed ones.
    pub(super) fn states(&self) -> Result<Vec<KeyState>, Problem> {
        let mut states = Vec::new();
        for number in self.all("state").flat_map(|list| list.split(',')) {
            match number.trim() {
                "1" => states.push(KeyState::Active),
                "2" => states.push(KeyState::Suspended),
                "3" => states.push(KeyState::Deactivated),
                "5" => states.push(KeyState::Destroyed),
                // Pre-activation: no key of this server is ever seen in this state.
                "0" => {}
                _ => return Err(wrong("state", "must list states out of 0, 1, 2, 3, 5")),
            }
        }
        if self.text("state").is_none() {
            states = vec![KeyState::Active, KeyState::Suspended, KeyState::Deactivated];
        }
        Ok(states)
    }

    /// Refuses parameters that would change the answer but are not built.
    pub(super) fn refuse(&self, names: &[&'static str]) -> Result<(), Problem> {
        match names.iter().find(|name| self.text(name).is_some()) {
            Some(name) => Err(Error::NotBuilt(name).into()),
            None => Ok(()),
        }
    }

    fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

fn wrong(name: &'static str, why: &str) -> Problem {
    Error::Query { name, why: why.to_owned() }.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn states_come_with_commas_repeated_escaped_or_empty() {
        let (one, two) = (vec![KeyState::Active], vec![KeyState::Active, KeyState::Destroyed]);
        let default = vec![KeyState::Active, KeyState::Suspended, KeyState::Deactivated];
        for (query, wanted) in [
            ("state=1", &one),
            ("state=1,5", &two),
            ("state=1%2C5", &two),
            ("state=1&state=5", &two),
            ("state=0,1,5", &two),
            ("state=", &default),
            ("", &default),
        ] {
            assert_eq!(&Query::parse(query).states().unwrap(), wanted, "{query}");
        }
        assert!(Query::parse("state=9").states().is_err());
        assert_eq!(Query::parse("state=0").states().unwrap(), []);
    }

    #[test]
    fn flags_come_in_any_case() {
        assert_eq!(Query::parse("totalCount=False").flag("totalCount").unwrap(), Some(false));
        assert_eq!(Query::parse("totalCount=TRUE").flag("totalCount").unwrap(), Some(true));
        assert_eq!(Query::parse("totalCount=").flag("totalCount").unwrap(), None);
        assert!(Query::parse("totalCount=1").flag("totalCount").is_err());
    }

    #[test]
    fn numbers_have_bounds() {
        assert_eq!(Query::parse("").number("limit", 200, 5000).unwrap(), 200);
        assert_eq!(Query::parse("limit=5000").number("limit", 200, 5000).unwrap(), 5000);
        for bad in ["5001", "-1", "1e3", "99999999999999999999"] {
            assert!(Query::parse(&format!("limit={bad}")).number("limit", 200, 5000).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_query_is_read_or_refused(text in ".{0,200}") {
            let query = Query::parse(&text);
            let _ = query.states();
            let _ = query.flag("force");
            prop_assert!(query.number("limit", 1, 9).map_or(true, |n| n <= 9));
        }
    }
}

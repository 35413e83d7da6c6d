//! Server addresses: resolving redirects, comparing origins, and displaying them without credentials.

use std::fmt;

use ureq::http::Uri;

/// An absolute `http` or `https` address. Its display omits the credentials that it may contain.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Address {
    text: String,
    uri: Uri,
}

impl Address {
    /// Parses an address. The error does not show the text, which may contain a password.
    pub(super) fn parse(text: &str) -> Result<Self, &'static str> {
        let uri: Uri = text.parse().map_err(|_| "it is not a valid address")?;
        match uri.scheme_str() {
            Some("http" | "https") if uri.host().is_some_and(|host| !host.is_empty()) => {}
            _ => return Err("it does not begin with `https://` or `http://` and a host"),
        }
        Ok(Self { text: text.to_owned(), uri })
    }

    /// The full address, including credentials.
    pub(super) fn as_str(&self) -> &str {
        &self.text
    }

    /// The origin: whether it is secure, the host and the port. The token may be sent to every address of the server's
    /// origin, and to no other.
    fn origin(&self) -> (bool, String, u16) {
        let secure = self.uri.scheme_str() == Some("https");
        let host = self.uri.host().unwrap_or_default().to_ascii_lowercase();
        (secure, host, self.uri.port_u16().unwrap_or(if secure { 443 } else { 80 }))
    }

    pub(super) fn same_origin(&self, other: &Self) -> bool {
        self.origin() == other.origin()
    }

    /// Resolves the location of a redirect (RFC 3986, section 5, without locations that consist of a query alone or
    /// contain `.` or `..`).
    pub(super) fn join(&self, location: &str) -> Result<Self, &'static str> {
        let location = location.split('#').next().unwrap_or_default();
        let scheme = self.uri.scheme_str().unwrap_or_default();
        let authority = self.uri.authority().map_or("", |authority| authority.as_str());
        // The query of an absolute path may contain an address, too.
        if location.contains("://") && !location.starts_with('/') {
            return Self::parse(location);
        }
        if let Some(rest) = location.strip_prefix("//") {
            return Self::parse(&format!("{scheme}://{rest}"));
        }
        if location.starts_with('/') {
            return Self::parse(&format!("{scheme}://{authority}{location}"));
        }
        let folder = self.uri.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        Self::parse(&format!("{scheme}://{authority}{folder}/{location}"))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let authority = self.uri.authority().map_or("", |authority| authority.as_str());
        let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        let path = self.uri.path_and_query().map_or("", |path| path.as_str());
        write!(formatter, "{}://{host}{}", self.uri.scheme_str().unwrap_or_default(), path.trim_end_matches('/'))
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        Address::parse(text).unwrap()
    }

    #[test]
    fn passwords_are_not_shown() {
        for text in
            ["https://user:secret@hub.example:8443/path?q=1", "http://secret@hub.example", "https://a:sec@ret:secret@h"]
        {
            let Ok(address) = Address::parse(text) else { continue };
            let shown = format!("{address} {address:?}");
            assert!(!shown.contains("sec"), "{shown}");
        }
        assert_eq!(address("https://user:secret@hub.example:8443/a?q=1").to_string(), "https://hub.example:8443/a?q=1");
        assert_eq!(address("https://hub.example").to_string(), "https://hub.example");
        for text in ["ftp://user:secret@hub", "user:secret@hub", "https://", "https://user:secret@hub/\u{7}", "", "hub"]
        {
            assert!(!Address::parse(text).unwrap_err().contains("secret"), "{text}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let home = address("https://hub.example/x");
        for same in ["https://HUB.example:443/y", "https://user:secret@hub.example/"] {
            assert!(home.same_origin(&address(same)), "{same}");
        }
        for other in
            ["http://hub.example/x", "https://hub.example:8443/x", "https://hub.example.org/x", "https://a.hub.example"]
        {
            assert!(!home.same_origin(&address(other)), "{other}");
        }
    }

    #[test]
    fn redirects_are_resolved() {
        let from = address("https://user:secret@hub.example/a/b?c");
        for (location, to) in [
            ("/x?y", "https://hub.example/x?y"),
            ("x", "https://hub.example/a/x"),
            ("//other.example/x", "https://other.example/x"),
            ("http://other.example/x#part", "http://other.example/x"),
            ("/x?next=http://other.example", "https://hub.example/x?next=http://other.example"),
        ] {
            assert_eq!(from.join(location).unwrap().to_string(), to, "{location}");
        }
        assert!(from.join("file:///etc/passwd").is_err());
    }
}

//! `with_*` methods like those of Burn's `#[derive(Config)]`. The derive itself is not used, since it requires every field in a
//! file and ignores unknown ones.

/// A documented `with_*` method for each field named.
macro_rules! setters {
    ($($setter:ident($field:ident: $type:ty);)*) => {
        $(
            #[doc = concat!("Sets [`", stringify!($field), "`](Self::", stringify!($field), ").")]
            pub fn $setter(mut self, $field: $type) -> Self {
                self.$field = $field;
                self
            }
        )*
    };
}
pub(crate) use setters;

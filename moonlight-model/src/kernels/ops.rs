//! The macro `ops!`, which declares the kernels and operations of [`super`].

/// Declares kernels, and the operations that are dispatched to them.
///
/// `kernels` lists traits with forward and gradient functions. The default of each function is the function of the same name in
/// `reference`; a backend overrides those that it can compute faster, in one file for each trait. `Kernels` combines all traits; a
/// backend opts in with an empty `impl`.
///
/// `operations` lists the methods of the trait `ModelOps`, which Burn dispatches by the backend of the tensors. They are implemented
/// for every backend with kernels by the expression after each signature (`B` is the backend). With gradients Burn dispatches
/// to `ModelOps` of `Autodiff`, in `autodiff`.
macro_rules! ops {
    (
        kernels {
            $(
                $(#[$doc:meta])*
                trait $kernel:ident {
                    $(
                        $(#[$function_doc:meta])*
                        fn $function:ident($($name:ident: $type:ty),* $(,)?) -> $result:ty;
                    )*
                }
            )*
        }
        operations {
            $( fn $operation:ident($($argument:tt)*) -> $output:ident<Self> = $forward:expr; )*
        }
    ) => {
        $(
            $(#[$doc])*
            pub(crate) trait $kernel: Backend {
                $(
                    $(#[$function_doc])*
                    fn $function($($name: $type),*) -> $result {
                        reference::$function::<Self>($($name),*)
                    }
                )*
            }
        )*

        /// A backend that implements every kernel trait, by its own code or by the reference.
        pub(crate) trait Kernels: Backend $(+ $kernel)* {}

        /// The operations that Burn dispatches. The public functions of the same names document their shapes.
        #[backend_extension(Flex: cfg(feature = "cpu"), Cube: cfg(feature = "cube"), Autodiff)]
        pub(crate) trait ModelOps: Backend {
            $( fn $operation($($argument)*) -> $output<Self>; )*
        }

        impl<B: Kernels> ModelOps for B {
            $( fn $operation($($argument)*) -> $output<Self> { $forward } )*
        }
    };
}
pub(super) use ops;

// Draws charts into an element, the newest that was asked for; each call gives the view, or nothing if a newer one came.
function drawer(named) {
  let asked = 0, last;
  named.setAttribute("role", "img");
  return async ({ spec, alt }) => {
    const drawn = document.createElement("div"), mine = ++asked;
    drawn.setAttribute("aria-hidden", "true"); // Vega calls every mark a picture, and gives none a name
    const made = await vegaEmbed(drawn, spec, { ast: true, actions: false, renderer: "svg" });
    if (mine !== asked) return void made.finalize();
    last?.finalize();
    last = made;
    named.setAttribute("aria-label", alt);
    named.replaceChildren(drawn);
    return made.view;
  };
}
